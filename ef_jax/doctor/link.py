"""The link by block size: copies as the engine makes them, eight blocks a call and one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.doctor.timing import least_seconds
from ef_jax.memory.host_store import aligned_empty
from ef_jax.memory.slot_pool import MAX_INSERT, insert_blocks, pool_shapes
from ef_jax.schedule.device_link import resolve_copy_mode
from ef_jax.spec.block_format import BlockFormat, block_format
from pallas_kernels import storage_dtype

_HIDDEN = 1024  # a block is [3, F, 1024] of 2 bytes, 6,144 bytes a row of F
WIDTHS = (12, 96, 768, 3072)  # 74 kB, 0.59, 4.7 and 19 MB
_SOURCE_BYTES = 150 << 20  # copied from in turn, so that no cache of the CPU holds it all
_MOST_SOURCES = 512
_KNEE = 0.8


class Point(NamedTuple):
    """Copies of one block size: seconds of a call of one block, and of eight."""

    nbytes: int
    one: float
    eight: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second, eight blocks a call."""
        return MAX_INSERT * self.nbytes / self.eight


def measure_link(device: jax.Device, widths: tuple[int, ...] = WIDTHS) -> dict[str, Any]:
    """Bandwidth, latency and cost of a block, and the rates by block size that they are from.

    A call of n blocks takes `latency + n (bytes / bandwidth + block_seconds)`: the bandwidth is that of the largest
    blocks, the others follow from the smallest. `knee_bytes` is the smallest block that reaches 80 % of the best rate.
    """
    points = [_measure(device, width) for width in widths]
    bandwidth, small = points[-1].bandwidth, points[0]
    further = max(0.0, (small.eight - small.one) / (MAX_INSERT - 1))
    best = max(point.bandwidth for point in points)
    return {
        "mode": resolve_copy_mode(None, device),
        "bandwidth": bandwidth,
        "latency": max(0.0, small.one - further),
        "block_seconds": max(0.0, further - small.nbytes / bandwidth),
        "knee_bytes": next(point.nbytes for point in points if point.bandwidth >= _KNEE * best),
        "by_block_bytes": {str(point.nbytes): point.bandwidth for point in points},
    }


def _measure(device: jax.Device, width: int) -> Point:
    form = block_format((3, width, _HIDDEN), "bfloat16")
    count = max(MAX_INSERT, min(_MOST_SOURCES, _SOURCE_BYTES // form.nbytes))
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    stored = storage_dtype(form.dtype)
    blocks = []
    for index in range(count):
        block = aligned_empty(form.shape, form.dtype).view(stored)
        block.fill(index)
        blocks.append(jax.device_put(block, pinned))
    jax.block_until_ready(blocks)
    copy = _Copy(form, device, blocks)
    one = least_seconds(lambda: copy(1))
    return Point(form.nbytes, one, least_seconds(lambda: copy(MAX_INSERT)))


class _Copy:
    """Copies the next blocks in turn into the first slots, as the device's link does, and waits for them."""

    def __init__(self, form: BlockFormat, device: jax.Device, blocks: list[jax.Array]) -> None:
        self._blocks, self._next = blocks, 0
        self._device = jax.sharding.SingleDeviceSharding(device)
        self._put = resolve_copy_mode(None, device) == "async"
        shape = pool_shapes(form, MAX_INSERT)
        assert isinstance(shape, jax.ShapeDtypeStruct)
        self._pool = jax.device_put(jnp.zeros(shape.shape, shape.dtype), self._device)
        self._insert = jax.jit(functools.partial(insert_blocks, form), donate_argnums=0)

    def __call__(self, count: int) -> None:
        taken = [self._blocks[(self._next + i) % len(self._blocks)] for i in range(count)]
        self._next += count
        if self._put:
            jax.block_until_ready(jax.device_put(taken, self._device))
        else:
            self._pool = self._insert(self._pool, taken, np.arange(count, dtype=np.int32))
            self._pool.block_until_ready()
