"""The expert blocks of a model, or one device's share of them, packed, one pinned-host array each."""

import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from ef_jax.errors import CheckpointError, LinkError
from ef_jax.spec import ModelSpec
from ef_jax.weights import Checkpoint
from pallas_kernels import storage_dtype

_ALIGNMENT = 64


@runtime_checkable
class Store(Protocol):
    """What a link asks for blocks by `(MoE layer, expert)`.

    Attributes:
      block_bytes: bytes of one block.
      nbytes: host bytes of all blocks that it holds.
    """

    block_bytes: int
    nbytes: int

    def request(self, keys: Sequence[tuple[int, int]]) -> bool:
        """Have the blocks of some keys in host memory, soon; whether all are. Never waits."""
        ...

    def block(self, layer: int, expert: int) -> jax.Array:
        """The block of an expert of MoE layer `layer`, waiting for it if need be: one array as
        `ModelSpec.block_format` says, floats as bits.

        Raises:
          LinkError: it cannot be had.
        """
        ...


class HostStore:
    """Pinned-host blocks by `(MoE layer, expert)`; filled once, never written again.

    Attributes:
      block_bytes: bytes of one block.
      nbytes: bytes of all blocks that it holds.
    """

    def __init__(self, spec: ModelSpec, blocks: Sequence[Sequence[jax.Array | None]]) -> None:
        """Of MoE layers, in order, the blocks of all experts: None for those that it does not hold."""
        self._blocks = blocks
        self.block_bytes = spec.block_bytes
        self.nbytes = spec.block_bytes * sum(block is not None for row in blocks for block in row)

    def block(self, layer: int, expert: int) -> jax.Array:
        """The block of an expert of MoE layer `layer`: one array as `ModelSpec.block_format` says, floats as bits.

        Raises:
          LinkError: it is one that this store does not hold.
        """
        block = self._blocks[layer][expert]
        if block is None:
            raise LinkError(f"expert {expert} of MoE layer {layer} is not held here: its block is another device's")
        return block

    def request(self, keys: Sequence[tuple[int, int]]) -> bool:
        """Have the blocks of some keys in host memory, soon; whether they are, as all that it holds always are here."""
        return True

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: jax.Device,
        *,
        keys: Iterable[tuple[int, int]] | None = None,
        advance: Callable[[int], None] = lambda nbytes: None,
        threads: int = 2,
    ) -> "HostStore":
        """Fill the store from a checkpoint, block by block.

        Args:
          checkpoint: where the weights are.
          device: whose pinned host memory to use.
          keys: `(MoE layer, expert)` of the blocks to hold; no other is read. None: all.
          advance: told the bytes of every block that has landed.
          threads: readers; reading releases the GIL.

        Raises:
          CheckpointError: a block cannot be read, or the pinned pool is full.
          ValueError: a key that the model does not have.
        """
        spec = checkpoint.spec
        held = _by_layer(spec, keys)
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        form = spec.block_format
        stored = storage_dtype(form.dtype)

        def read(layer: int, expert: int) -> jax.Array:
            block = aligned_empty(form.shape, form.dtype)
            checkpoint.read_block(layer, expert, block)
            return jax.device_put(block.view(stored), sharding)

        blocks = []
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for layer, experts in zip(spec.moe_layers, held, strict=True):
                row: list[jax.Array | None] = [None] * spec.experts.count
                try:
                    for expert, block in zip(experts, pool.map(read, [layer] * len(experts), experts), strict=True):
                        row[expert] = block
                    jax.block_until_ready(row)
                except jax.errors.JaxRuntimeError as error:
                    need = spec.block_bytes * sum(map(len, held))
                    raise CheckpointError(_pinned_pool_message(need, error)) from error
                blocks.append(row)
                advance(spec.block_bytes * len(experts))
        return cls(spec, blocks)


def _by_layer(spec: ModelSpec, keys: Iterable[tuple[int, int]] | None) -> list[list[int]]:
    """The experts of each MoE layer that keys name, rising."""
    layers, count = len(spec.moe_layers), spec.experts.count
    if keys is None:
        return [list(range(count))] * layers
    held: list[set[int]] = [set() for _ in range(layers)]
    for layer, expert in keys:
        if not (0 <= layer < layers and 0 <= expert < count):
            raise ValueError(f"key {layer, expert} is beyond {layers} MoE layers of {count} experts")
        held[layer].add(expert)
    return [sorted(experts) for experts in held]


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which `device_put` on CPU takes over without a copy.

    The caller must not write to it after the `device_put`.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _pinned_pool_message(nbytes: int, error: Exception) -> str:
    need = nbytes / 2**30
    first = str(error).splitlines()[0]
    return (
        f"pinned host memory is exhausted ({first}); the experts need {need:.1f} GiB: "
        f"set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={int(need * 1.1) + 1} or more before starting Python"
    )
