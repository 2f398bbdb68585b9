"""The link of a JAX device, from pinned host memory to the slot pool: whole blocks, several a call."""

import time
from collections.abc import Sequence
from typing import Literal, get_args

import jax

from ef_jax.errors import InputError
from ef_jax.memory.host_store import HostStore
from ef_jax.memory.slot_pool import MAX_INSERT, SlotPool
from ef_jax.spec import ModelSpec

CopyMode = Literal["async", "in_program"]


class DeviceLink:
    """Copies blocks from a host store into a slot pool.

    `mode` says how. "async": `device_put` into fresh device arrays, which overlaps with compute, then an insert; the
    default on accelerators. "in_program": the insert itself reads the pinned blocks; the default on CPU, where it is
    two to nine times faster (see `SlotPool`) and copies cost the cores that compute.

    Attributes:
      pool: the slot pool; its array is replaced by every `finish`.
      bytes_moved: bytes asked to cross since construction.
      seconds: host time spent in `start` and `finish`.
    """

    def __init__(
        self, spec: ModelSpec, store: HostStore, device: jax.Device, *, slots: int, mode: str | None = None
    ) -> None:
        self.mode = resolve_copy_mode(mode, device)
        self._store = store
        self._sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self.pool = SlotPool(spec, slots, device, memory_kind="device" if self.mode == "async" else "pinned_host")
        self.bytes_moved = 0
        self.seconds = 0.0

    def start(self, layer: int, experts: Sequence[int]) -> list[jax.Array]:
        """Start copying the blocks of `experts` of MoE layer `layer`, where the mode can; never waits."""
        began = time.perf_counter()
        blocks = [self._store.block(layer, expert) for expert in experts]
        if self.mode == "async":
            blocks = [
                block
                for first in range(0, len(blocks), MAX_INSERT)
                for block in jax.device_put(blocks[first : first + MAX_INSERT], self._sharding)
            ]
        self.bytes_moved += len(blocks) * self._store.block_bytes
        self.seconds += time.perf_counter() - began
        return blocks

    def finish(self, blocks: Sequence[jax.Array], slots: Sequence[int]) -> None:
        """Put started `blocks` into `slots`; programs dispatched afterwards see them."""
        began = time.perf_counter()
        self.pool.insert(blocks, slots)
        self.seconds += time.perf_counter() - began

    def settle(self) -> None:
        """Wait, where copies hold device memory of their own, until every block handed to `finish` is in its slot."""
        if self.mode == "async":
            self.pool.array.block_until_ready()


def blocks_in_flight(mode: CopyMode, device: jax.Device) -> tuple[int, int]:
    """Device blocks that copies hold besides the pool: at least so many, and so many staging rings.

    Asynchronous copies have at most two waves under way. A copy inside an insert is a temporary of that program, but
    not on CPU (`SlotPool.temp_bytes` is 0 there).
    """
    if mode == "async":
        return MAX_INSERT, 2
    return (0 if device.platform == "cpu" else MAX_INSERT), 0


def resolve_copy_mode(mode: str | None, device: jax.Device) -> CopyMode:
    """`mode`, or the default for `device`.

    Raises:
      InputError: no such mode.
    """
    if mode is None:
        return "in_program" if device.platform == "cpu" else "async"
    for known in get_args(CopyMode):
        if mode == known:
            return known
    raise InputError(f"copy mode {mode!r} is not one of {', '.join(get_args(CopyMode))}")
