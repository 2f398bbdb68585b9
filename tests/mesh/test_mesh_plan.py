"""Plans of a mesh's devices: measured on the mesh's programs, and estimated where only one device is at hand."""

import dataclasses

import jax
import numpy as np
import pytest

from ef_jax.errors import BudgetError, InputError
from ef_jax.memory import host_plan
from ef_jax.memory.plan import MemoryPlan, MemoryRequest
from ef_jax.memory.plan import kv_cache_bytes as kv_bytes
from ef_jax.mesh.mesh_option import layout_for
from ef_jax.mesh.mesh_spec import MeshSpec
from ef_jax.mesh.planning import estimate_on_mesh, plan_on_mesh
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.share import device_share, held_keys
from ef_jax.paging import check_host_memory
from ef_jax.placement import Placement
from ef_jax.planning import make_request
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.programs import Programs
from tests.schedule.tiny_store import EXPERTS, LAYERS, SPEC

MESH = MeshSpec(data=2, expert=4)
PLACEMENT = Placement.contiguous(layers=LAYERS, experts=EXPERTS, devices=4)
REQUEST = MemoryRequest(expert_fraction=0.5, batch=16, context=32, chunk=16)


@pytest.fixture(scope="module")
def planned() -> tuple[MemoryPlan, MeshPrograms]:
    kernels = choose_kernels(SPEC, jax.devices()[0])
    return plan_on_mesh(SPEC, REQUEST, layout_for(MESH, SPEC), PLACEMENT, "padded", None, kernels=kernels)


def test_a_plan_is_of_one_device_and_its_part(planned: tuple[MemoryPlan, MeshPrograms]) -> None:
    plan, programs = planned
    assert plan.share == device_share(MESH, PLACEMENT, SPEC)
    assert (plan.batch, plan.rows_here, programs.batch, programs.rows) == (16, 2, 2, 2)
    assert plan.kv_cache == kv_bytes(SPEC, 2, 32)
    assert (plan.experts, plan.slots, plan.staging_slots) == (12, 6, 4)
    assert programs.pool_slots == 10
    assert plan.workspace == programs.workspace_bytes > 0
    assert plan.host_bytes == 2 * SPEC.total_experts * SPEC.block_bytes  # both groups hold all
    assert plan.token_cycle == LAYERS * 4
    assert not any("estimate" in text for text in plan.warnings)


def test_an_estimate_is_about_what_is_measured(planned: tuple[MemoryPlan, MeshPrograms]) -> None:
    device = jax.devices()[0]
    kernels = choose_kernels(SPEC, device)
    estimate = estimate_on_mesh(SPEC, REQUEST, MESH, PLACEMENT, device, None, kernels=kernels)
    assert 0.7 < estimate.workspace / planned[0].workspace < 3
    assert any("estimate" in text for text in estimate.warnings)
    same = {"workspace", "reserve", "budget", "share"}
    fields = [field.name for field in dataclasses.fields(MemoryPlan) if field.name not in same]
    assert [getattr(estimate, name) for name in fields] == [getattr(planned[0], name) for name in fields]


def test_an_estimate_needs_no_devices() -> None:
    """For as many sequences on each of more devices than there are, the same programs are compiled."""
    mesh, device = dataclasses.replace(MESH, data=8), jax.devices()[0]
    request = dataclasses.replace(REQUEST, batch=64)
    plan = estimate_on_mesh(SPEC, request, mesh, PLACEMENT, device, None, kernels=choose_kernels(SPEC, device))
    assert plan.share is not None
    assert (plan.share.devices, plan.share.row_shards, plan.rows_here) == (32, 32, 2)
    assert "on each of 32 devices (data=8,expert=4, experts placed contiguous)" in str(plan)


def test_along_tensor_dense_weights_and_caches_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Programs, "compile_largest", lambda self: None)
    monkeypatch.setattr(Programs, "workspace_bytes", 1000)
    attention = dataclasses.replace(SPEC.attention, kv_heads=2)
    spec = dataclasses.replace(SPEC, attention=attention, tie_embeddings=False)
    device = jax.devices()[0]
    whole, half = (
        estimate_on_mesh(spec, REQUEST, mesh, PLACEMENT, device, None, kernels=choose_kernels(spec, device))
        for mesh in (MeshSpec(expert=4), MeshSpec(data=2, expert=2, tensor=2))
    )
    divided = LAYERS * (spec.attention.qkv_width + 2 * 8) * spec.hidden + spec.vocab * spec.hidden
    assert whole.dense - half.dense == divided  # half of them, of 2 bytes
    assert half.kv_cache == whole.kv_cache // 2
    assert half.workspace > 1000


def test_the_device_with_the_most_experts_is_planned_for() -> None:
    holds = PLACEMENT.holds.copy()
    holds[0, :2, 3] = True  # two replicas on the last device
    share = device_share(MESH, Placement.of(holds), SPEC, placed="a.npz", local=[0, 3])
    assert (share.held, share.most_in_layer, share.host_blocks) == (14, 6, 12 + 14)
    assert (share.local_devices, share.devices, share.placement) == (2, 8, "a.npz")
    assert device_share(MESH, Placement.of(holds), SPEC).host_blocks == 2 * (3 * 12 + 14)
    keys = held_keys(Placement.of(holds), 3)
    assert len(keys) == len(set(keys)) == 14
    assert np.array_equal(sorted(keys), keys)


def test_requests_name_sequences_that_the_mesh_can_share() -> None:
    device = jax.devices()[0]
    with pytest.raises(InputError, match="batch 9 cannot be shared by data=2 x expert=4 evenly: give batch 8 or 16"):
        make_request(SPEC, device, batch=9, mesh=MESH)
    with pytest.raises(InputError, match="sequences 20 cannot be shared"):
        make_request(SPEC, device, batch=8, sequences=20, mesh=MESH)
    assert make_request(SPEC, device, batch=8, sequences=24, mesh=MESH).rows == 24


def test_host_memory_is_checked_for_this_process(planned: tuple[MemoryPlan, MeshPrograms], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """On CPU what is on this process's devices is in the same memory."""
    plan = planned[0]
    monkeypatch.setattr(host_plan, "available_memory", lambda: plan.host_bytes + 8 * plan.total)
    check_host_memory(plan, jax.devices()[0])
    monkeypatch.setattr(host_plan, "available_memory", lambda: plan.host_bytes + 8 * plan.total - 1)
    with pytest.raises(BudgetError, match="share the experts among devices of more hosts"):
        check_host_memory(plan, jax.devices()[0])
