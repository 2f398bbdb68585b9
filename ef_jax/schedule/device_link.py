"""The link of a JAX device, from pinned host memory to the slot pool: whole blocks, several a call."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import jax

from ef_jax.choices import chosen
from ef_jax.errors import LinkError
from ef_jax.memory.host_store import Store
from ef_jax.memory.policies import Key
from ef_jax.memory.slot_pool import MAX_INSERT, SlotPool
from ef_jax.spec import ModelSpec
from ef_jax.timeline import DEMAND, Timeline

CopyMode = Literal["async", "in_program"]

TIMEOUT_SECONDS = 60.0
"""A copy that has not come after so long will not: even 8 blocks of 350 MB over a tenth of PCIe 3.0 take 2 s."""

COPY_ERRORS = (RuntimeError, MemoryError, OSError)  # JAX's are RuntimeErrors


@dataclasses.dataclass(frozen=True, slots=True)
class Coming:
    """Demanded blocks that are not in host memory yet: their keys."""

    keys: list[Key]


class DeviceLink:
    """Copies blocks from a host store into a slot pool.

    `mode` says how. "async": `device_put` into fresh device arrays, which overlaps with compute, then an insert; the
    default on accelerators. "in_program": the insert itself reads the pinned blocks; the default on CPU, where it is
    two to nine times faster (see `SlotPool`) and copies cost the cores that compute.

    It copies on demand only: `AsyncLink` prefetches as well.

    Attributes:
      pool: the slot pool; its array is replaced by every `finish`.
      block_bytes: bytes of one block.
      bytes_moved: bytes asked to cross since construction.
      seconds: host time spent in `start` and `finish`.
      timeline: hears of every demand copy, if it is not None; each is then waited for.
    """

    def __init__(
        self, spec: ModelSpec, store: Store, device: jax.Device, *, slots: int, mode: str | None = None
    ) -> None:
        self.mode = resolve_copy_mode(mode, device)
        self._store = store
        self._sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        self.pool = SlotPool(spec, slots, device, memory_kind="device" if self.mode == "async" else "pinned_host")
        self.block_bytes = store.block_bytes
        self.bytes_moved = 0
        self.seconds = 0.0
        self.timeline: Timeline | None = None
        self._demanded: list[Key] = []
        self._demanded_at = 0.0

    def start(self, layer: int, experts: Sequence[int]) -> list[jax.Array] | Coming:
        """Start copying the blocks of `experts` of MoE layer `layer`, where the mode can; never waits. Where one of
        them is not in host memory, only have them come there.

        Raises:
          LinkError: the device takes no copy.
        """
        keys = [(layer, expert) for expert in experts]
        return self._start(keys) if self.request(keys) else Coming(keys)

    def request(self, keys: Sequence[Key]) -> bool:
        """Have the blocks of `keys` in host memory, soon; whether all are."""
        return self._store.request(keys)

    def fetch(self, keys: Sequence[Key]) -> list[jax.Array]:
        """Start copying the blocks of `keys`, where the mode can; waits for none that is in host memory.

        Raises:
          LinkError: the device takes no copy, or a block cannot be had.
        """
        try:
            blocks = [self._store.block(*key) for key in keys]
            if self.mode == "async":
                blocks = [
                    block
                    for first in range(0, len(blocks), MAX_INSERT)
                    for block in jax.device_put(blocks[first : first + MAX_INSERT], self._sharding)
                ]
        except LinkError:
            raise
        except COPY_ERRORS as error:
            raise link_error(keys, error) from error
        self.bytes_moved += len(blocks) * self.block_bytes
        return blocks

    def finish(self, blocks: Sequence[jax.Array] | Coming, slots: Sequence[int]) -> None:
        """Put started `blocks` into `slots`; programs dispatched afterwards see them.

        Raises:
          LinkError: the device does not take them, or one cannot be had.
        """
        if isinstance(blocks, Coming):
            blocks = self._start(blocks.keys)
        began = time.perf_counter()
        self._insert(blocks, slots)
        if self.timeline is not None and blocks:
            self.pool.latest.block_until_ready()
            self._show_demand(self._demanded_at, time.perf_counter())
        self.seconds += time.perf_counter() - began

    def beside(self, layer: int, experts: Sequence[int], nbytes: int) -> float:
        """Somebody else starts a copy over the same wire, `nbytes` an expert; returns when it is across, for `hold`."""
        self.bytes_moved += len(experts) * nbytes
        return 0.0

    def hold(self, keys: Sequence[Key], ready: float) -> None:
        """What `beside` was told of is not held back here."""

    def settle(self) -> None:
        """Wait, where copies hold device memory of their own, until every block handed to `finish` is in its slot."""
        if self.mode == "async":
            self.pool.latest.block_until_ready()

    def _start(self, keys: list[Key]) -> list[jax.Array]:
        """Start copying demanded blocks, waiting for those that are not in host memory."""
        began = self._demanded_at = time.perf_counter()
        self._demanded = keys
        blocks = self.fetch(keys)
        self.seconds += time.perf_counter() - began
        return blocks

    def _insert(self, blocks: Sequence[jax.Array], slots: Sequence[int]) -> None:
        try:
            self.pool.insert(blocks, slots)
        except COPY_ERRORS as error:
            raise LinkError(f"blocks cannot be put into slots {list(slots)}: {_first_line(error)}") from error

    def _show_demand(self, began: float, ended: float) -> None:
        """Note when the last demand copy was under way."""
        if self.timeline is not None:
            layer, experts = self._demanded[0][0], [expert for _, expert in self._demanded]
            self.timeline.span(DEMAND, f"layer {layer}", began, ended, layer=layer, experts=experts)


def link_error(keys: Sequence[Key], reason: BaseException | str) -> LinkError:
    """The error that says that the blocks of some keys do not come."""
    named = ", ".join(f"expert {expert} of MoE layer {layer}" for layer, expert in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    why = reason if isinstance(reason, str) else _first_line(reason)
    return LinkError(f"{named}{more} cannot be copied to the device: {why}")


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
    return chosen("copy mode", mode, CopyMode)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
