"""The memory plan's arithmetic and its refusals."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import BudgetError, InputError
from ef_jax.memory.device_share import DeviceShare
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


def share_of(**changes: object) -> DeviceShare:
    """Four devices, each with a quarter of SPEC's experts, in two processes."""
    share = DeviceShare(
        mesh="expert=4",
        placement="contiguous",
        devices=4,
        local_devices=2,
        row_shards=4,
        sources=4,
        held=16,
        most_in_layer=4,
        host_blocks=32,
    )
    return dataclasses.replace(share, **changes)


@given(budget=st.integers(1, 2_000_000), batch=st.integers(1, 9), held=st.integers(4, 64), rings=st.integers(0, 2))
def test_a_device_of_a_mesh_keeps_to_its_budget_and_its_experts(budget, batch, held, rings):
    fixed = dataclasses.replace(FIXED, dense=100_000, transfer_blocks=4 * rings, transfer_rings=rings)
    share = share_of(held=held, most_in_layer=min(16, held))
    request = MemoryRequest(device_memory=budget, batch=4 * batch)
    try:
        plan = make_plan(SPEC, request, fixed, share=share)
    except BudgetError as error:
        least = int(str(error).split("needs at least ")[1].split()[0])
        assert least > budget
        plan = make_plan(SPEC, dataclasses.replace(request, device_memory=least), fixed, share=share)
        assert plan.slots in (0, held)
        with pytest.raises(BudgetError):
            make_plan(SPEC, dataclasses.replace(request, device_memory=least - 1), fixed, share=share)
    assert plan.total <= plan.budget
    assert plan.slots <= plan.experts == held
    a_step = min(share.most_in_layer, 8 * batch)
    assert plan.slots == held or a_step <= plan.staging_slots <= share.most_in_layer
    assert plan.token_cycle == 4 * a_step


def test_a_share_of_everything_changes_no_figure():
    everything = share_of(
        devices=1, local_devices=1, row_shards=1, sources=1, held=64, most_in_layer=16, host_blocks=64
    )
    for options in ({"device_memory": 2_000_000}, {"expert_fraction": 0.25, "batch": 3}, {"expert_fraction": 1.0}):
        request = MemoryRequest(**options, host_memory=60 * SPEC.block_bytes)
        alone = make_plan(SPEC, request, FIXED)
        assert alone.share is None
        assert alone.host is not None
        assert dataclasses.replace(make_plan(SPEC, request, FIXED, share=everything), share=None) == alone


def test_fractions_are_of_the_experts_that_a_device_holds():
    replicas = share_of(held=20, most_in_layer=5, host_blocks=40)
    for share, fraction, slots in ((share_of(), 0.5, 8), (share_of(), 1.0, 16), (replicas, 0.5, 10)):
        plan = make_plan(SPEC, MemoryRequest(expert_fraction=fraction, batch=4), FIXED, share=share)
        assert plan.slots == slots
        assert plan.staging_slots == (0 if fraction == 1 else share.most_in_layer)
        assert plan.host_bytes == share.host_blocks * SPEC.block_bytes
    assert share_of().experts_a_step(SPEC, 4) == 4  # four tokens, two experts each, of the four held
    assert share_of(most_in_layer=16).experts_a_step(SPEC, 4) == 8
    assert share_of(most_in_layer=16, sources=2).experts_a_step(SPEC, 4) == 4  # two groups


def test_the_plan_says_of_what_it_is_one():
    request = MemoryRequest(expert_fraction=0.5, batch=4, rows=8, context=64)
    plan = make_plan(SPEC, request, FIXED, share=share_of(whole=("latent attention",), estimated=True))
    lines = str(plan).splitlines()
    assert lines[0].endswith("on each of 4 devices (expert=4, experts placed contiguous)")
    assert "whole on each device: latent attention" in str(plan)
    assert "2 sequences x 64 tokens, of 8 in all" in str(plan)
    assert "8 of 16 expert blocks" in str(plan)
    assert "pinned, 32 expert blocks, of 2 devices of this process" in str(plan)
    assert "the workspace is an estimate" in lines[-1]
    contents = plan.as_dict()
    assert (contents["batch"], contents["rows"], contents["experts"]) == (4, 8, 16)
    assert contents["share"]["devices"] == 4
    assert contents["share"]["mesh"] == "expert=4"
    assert len(contents["warnings"]) == 1 + (plan.slots < plan.token_cycle)


def test_host_memory_is_shared_by_the_devices_of_a_process():
    share = share_of(held=64, most_in_layer=16, host_blocks=128)
    request = MemoryRequest(expert_fraction=0.25, batch=4, host_memory=120 * SPEC.block_bytes)
    plan = make_plan(SPEC, request, FIXED, share=share)
    assert plan.host is not None
    assert 0 < plan.host.places < 64
    assert 2 * plan.host.nbytes == plan.host_bytes <= 120 * SPEC.block_bytes
    assert plan.disk_bytes == 2 * (64 - plan.host.places) * SPEC.block_bytes
    enough = dataclasses.replace(request, host_memory=128 * SPEC.block_bytes)
    assert make_plan(SPEC, enough, FIXED, share=share).host is None
    with pytest.raises(BudgetError, match=r"host_memory .* too small: this model needs at least") as error:
        make_plan(SPEC, dataclasses.replace(request, host_memory=1000), FIXED, share=share)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert make_plan(SPEC, dataclasses.replace(request, host_memory=least), FIXED, share=share).host is not None
