"""The memory plan's arithmetic and its refusals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import BudgetError, InputError
from ef_jax.memory.plan import FixedBytes, MemoryRequest, check_host_pool, make_plan
from ef_jax.memory.sizes import format_bytes, parse_bytes
from ef_jax.runtime.expert_kernels import ExpertKernels
from ef_jax.spec import AttentionSpec, ExpertSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from pallas_kernels import Target

SPEC = ModelSpec(
    family="qwen3_moe",
    vocab=128,
    hidden=64,
    max_position=512,
    norm_eps=1e-6,
    tie_embeddings=True,
    dtype="bfloat16",
    layers=(LayerSpec(ffn="moe"),) * 4,
    attention=AttentionSpec(heads=4, kv_heads=2, head_dim=16, rope=RopeSpec(theta=1e4, dim=16)),
    router=RouterSpec(),
    experts=ExpertSpec(count=16, top_k=2, width=32),
)
FIXED = FixedBytes(
    dense=1_000_000,
    kv_cache=200_000,
    state=1000,
    look_ahead=0,
    workspace=300_000,
    transfer_blocks=0,
    transfer_rings=0,
)


@given(budget=st.integers(1, 4_000_000), batch=st.integers(1, 9), rings=st.integers(0, 2))
def test_a_plan_never_exceeds_its_budget_and_the_refusal_names_one_that_works(budget, batch, rings):
    fixed = dataclasses.replace(FIXED, transfer_blocks=4 * rings, transfer_rings=rings)
    request = MemoryRequest(device_memory=budget, batch=batch)
    try:
        plan = make_plan(SPEC, request, fixed)
    except BudgetError as error:
        least = int(str(error).split("needs at least ")[1].split()[0])
        assert least > budget
        plan = make_plan(SPEC, dataclasses.replace(request, device_memory=least), fixed)
        assert plan.slots == 0
        with pytest.raises(BudgetError):
            make_plan(SPEC, dataclasses.replace(request, device_memory=least - 1), fixed)
    assert plan.total <= plan.budget
    assert plan.total == sum(plan.items.values())
    assert plan.transfers == max(4 * rings, rings * plan.staging_slots) * SPEC.block_bytes
    assert plan.cache_slots == plan.slots * SPEC.block_bytes
    assert plan.slots == SPEC.total_experts or plan.staging_slots >= min(16, 2 * batch)


def test_a_budget_is_used_to_the_last_slot():
    plan = make_plan(SPEC, MemoryRequest(device_memory=2_000_000), FIXED)
    assert 0 < plan.slots < SPEC.total_experts
    assert plan.budget - plan.total < 2 * SPEC.block_bytes
    everything = make_plan(SPEC, MemoryRequest(device_memory=10_000_000), FIXED)
    assert (everything.slots, everything.staging_slots) == (64, 0)


def test_prefetches_have_memory_beside_what_a_step_asks_for_unless_prompts_need_more():
    def transfers(**fixed: int) -> int:
        plan = make_plan(SPEC, MemoryRequest(expert_fraction=0.5, batch=3), dataclasses.replace(FIXED, **fixed))
        return plan.transfers // SPEC.block_bytes

    assert transfers(transfer_rings=2, prefetch_blocks=8) == 2 * 16
    assert transfers(transfer_blocks=8, prefetch_blocks=8) == 3 * 2 + 8
    assert transfers(transfer_blocks=8) == 8
    resident = make_plan(SPEC, MemoryRequest(expert_fraction=1.0), dataclasses.replace(FIXED, prefetch_blocks=8))
    assert resident.transfers == 0  # nothing can miss


def test_fractions_count_cache_slots():
    for fraction, slots in ((0.0, 0), (0.25, 16), (0.5, 32), (1.0, 64)):
        plan = make_plan(SPEC, MemoryRequest(expert_fraction=fraction), FIXED)
        assert plan.slots == slots
        assert plan.budget == plan.total
        assert bool(plan.warnings) == (slots < 8)
        assert (plan.staging_slots == 0) == (fraction == 1.0)
    assert "64 expert blocks" in str(plan)
    assert plan.as_dict()["total"] == plan.total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either device_memory or expert_fraction"),
        ({"device_memory": 5, "expert_fraction": 0.5}, "either device_memory or expert_fraction"),
        ({"device_memory": 0}, "device_memory must be positive, got 0"),
        ({"expert_fraction": -0.1}, "between 0 and 1, got -0.1"),
        ({"expert_fraction": float("nan")}, "between 0 and 1, got nan"),
        ({"expert_fraction": 0.5, "batch": 0}, "batch must be between 1 and 1024, got 0"),
        ({"expert_fraction": 0.5, "context": 1}, "context must be at least 2 tokens, got 1"),
        ({"expert_fraction": 0.5, "chunk": 0}, "chunk must be positive, got 0"),
    ],
)
def test_absurd_requests_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MemoryRequest(**options)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5g", 3 * 2**29), ("4096", 4096), (7, 7), ("2kb", 2000)],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "1e3", "8 GiBs", "1" * 40, "nan", "8GiB "[:3] + "Q"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="is not a size in bytes"):
        parse_bytes(text)


def test_sizes_are_written():
    assert [format_bytes(n) for n in (0, 999, 1500, 73_728, 2_250_000, 999_600_000, 6 * 10**9, 7 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "73.7 kB",
        "2.25 MB",
        "1 GB",
        "6 GB",
        "7 TB",
    ]


def test_the_pinned_host_limit_is_checked_on_accelerators(monkeypatch):
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "0")
    check_host_pool(SPEC.total_experts * SPEC.block_bytes, "cpu")
    with pytest.raises(BudgetError, match="set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=1 before"):
        check_host_pool(SPEC.total_experts * SPEC.block_bytes, "gpu")


def test_a_pool_that_kernels_cannot_read_is_made_smaller() -> None:
    """Triton's cannot read 8-bit arrays of 2 to 4 GiB, of any size below and above."""
    free = make_plan(SPEC, MemoryRequest(expert_fraction=0.5), FIXED)
    most = free.slots + free.staging_slots
    plan = make_plan(SPEC, MemoryRequest(expert_fraction=0.5), FIXED, readable=lambda slots: slots < most - 2)
    assert (plan.slots, plan.left_out) == (free.slots - 3, 3)
    assert plan.staging_slots == free.staging_slots
    assert "3 more cache slots are not used" in plan.warnings[-1]
    assert not free.left_out
    request = MemoryRequest(device_memory=free.total)
    room = make_plan(SPEC, request, FIXED).slots
    budget = make_plan(SPEC, request, FIXED, readable=lambda slots: slots < most - 2)
    assert (budget.slots, budget.left_out) == (plan.slots, room - plan.slots)
    assert budget.left_out > 0
    everything = make_plan(SPEC, MemoryRequest(expert_fraction=1.0), FIXED, readable=lambda slots: slots < 40)
    assert everything.slots + everything.staging_slots == 39


def test_kernels_say_which_pools_they_can_read() -> None:
    experts = dataclasses.replace(SPEC.experts, width=2880, quantization="mxfp4", bias=True)
    spec = dataclasses.replace(SPEC, hidden=2880, experts=experts)
    target = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132)
    kernels = ExpertKernels(decode="triton", prompt="triton", target=target)
    assert [kernels.take(spec, slots) for slots in (1, 172, 173, 345, 346, 768)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert ExpertKernels(decode="xla", prompt="xla", target=target).take(spec, 200)
