"""Blocks of every kind computed from host memory give the bits that they give in their slots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax.loading import bundled_model
from ef_jax.memory.slot_pool import insert_blocks, pool_shapes
from ef_jax.runtime import steps
from ef_jax.runtime.compute_in_place import rows_by_expert
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.weights import open_checkpoint


def spec_of(**experts: Any) -> Any:
    spec = open_checkpoint(bundled_model(), None).spec
    return dataclasses.replace(spec, hidden=128, experts=dataclasses.replace(spec.experts, width=64, **experts))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "experts",
    [
        {"quantization": "mxfp4", "bias": True, "activation": "clamped_swiglu"},
        {"gated": False, "activation": "relu"},
        {"scale_input": True},
    ],
    ids=["mxfp4 and biases", "no gate", "scaled inputs"],
)
def test_every_kind_of_expert_as_from_its_slot(experts: dict[str, Any], batch: int) -> None:
    spec, device, random = spec_of(**experts), jax.devices()[0], np.random.default_rng(0)
    kernels = choose_kernels(spec, device)
    host = HostExperts(spec, kernels, batch=batch, device=device)
    form, count, top_k = spec.block_format, spec.experts.count, spec.experts.top_k
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    parts = [host.any_block() for _ in range(2)]
    for block in parts:
        bytes_of = block.reshape(-1).view(np.uint8)
        bytes_of += random.integers(0, 3, bytes_of.shape, np.uint8)
    blocks = [jax.device_put(block, pinned) for block in parts]
    ids = np.stack([random.permutation(count)[:top_k] for _ in range(batch)]).astype(np.int32)[:, None]
    chosen = [int(ids[0, 0, 1]), int(ids[-1, 0, 0])]
    dtype = jnp.dtype(spec.dtype)
    h = jnp.asarray(random.normal(size=(batch, 1, spec.hidden)), dtype)
    weights = jnp.asarray(random.uniform(size=ids.shape), dtype if spec.router.casts_back else np.float32)
    routed = steps.Routed(h, h, jnp.asarray(ids), weights)
    slot_row = np.full(count, -1, np.int32)
    slot_row[chosen] = 0, 1
    outputs = jnp.full((batch * top_k, spec.hidden), 7, dtype)

    @jax.jit
    def from_slots(blocks: Any) -> jax.Array:
        empty = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), pool_shapes(form, 2))
        pool = insert_blocks(form, empty, blocks, jnp.arange(2, dtype=jnp.int32))
        return steps.run_experts(spec, kernels, routed, pool, jnp.asarray(slot_row), outputs)

    computed = host.begin(outputs)
    for block, places, to in zip(blocks, *rows_by_expert(ids, chosen), strict=True):
        computed = host.run(block, host.inputs(h, weights), places, to, computed)
    ours = np.asarray(host.end(computed, np.empty(0, int), outputs).astype(np.float32))
    assert np.array_equal(ours, np.asarray(from_slots(blocks).astype(np.float32)))
    assert np.isfinite(ours).all()
    assert 2 <= (ours != 7).any(axis=1).sum() < batch * top_k
