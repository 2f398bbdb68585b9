"""A host store of tiny made-up blocks, and what a pool holds of them."""

import jax
import numpy as np

from ef_jax.memory.host_store import HostStore
from ef_jax.memory.slot_pool import SlotPool
from ef_jax.spec import AttentionSpec, ExpertSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from pallas_kernels import storage_dtype

LAYERS, EXPERTS = 3, 16
SPEC = ModelSpec(
    family="qwen3_moe",
    hidden=16,
    vocab=32,
    max_position=64,
    norm_eps=1e-6,
    tie_embeddings=True,
    dtype="bfloat16",
    layers=(LayerSpec(ffn="moe"),) * LAYERS,
    attention=AttentionSpec(heads=2, kv_heads=1, head_dim=8, rope=RopeSpec(theta=1e4, dim=8)),
    router=RouterSpec(),
    experts=ExpertSpec(count=EXPERTS, top_k=2, width=8),
)


def tiny_store() -> HostStore:
    """Every block is filled with a number of its own."""
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    dtype = storage_dtype(SPEC.dtype)
    blocks = [
        [jax.device_put(np.full(SPEC.block_shape, mark(layer, expert), dtype), pinned) for expert in range(EXPERTS)]
        for layer in range(LAYERS)
    ]
    return HostStore(SPEC, blocks)


def mark(layer: int, expert: int) -> int:
    """The number that the block of a key is filled with."""
    return 1 + layer * EXPERTS + expert


def marks(pool: SlotPool) -> list[int]:
    """The number in each slot, 0 where nothing was ever put; fails if a block is not the same throughout."""
    slots = np.asarray(pool.array).reshape(pool.array.shape[0], -1)
    assert (slots == slots[:, :1]).all()
    return slots[:, 0].tolist()


def empty(pool: SlotPool) -> None:
    """Zeros in every slot."""
    pool.array = jax.jit(jax.numpy.zeros_like)(pool.array)
