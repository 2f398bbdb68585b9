"""The link of a device whose copies overlap with compute: prefetches into fresh arrays, then into their slots."""

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Sequence

import jax

from ef_jax.errors import LinkError
from ef_jax.memory.host_store import Store
from ef_jax.memory.policies import Key
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.schedule.device_link import COPY_ERRORS, TIMEOUT_SECONDS, Coming, DeviceLink, link_error
from ef_jax.schedule.pace import LinkPace, PaceMeter
from ef_jax.schedule.readiness import is_ready, ready_within
from ef_jax.schedule.wall_clock import WallClock
from ef_jax.spec import ModelSpec
from ef_jax.timeline import PREFETCH

_AHEAD_BYTES = 64 * 2**20  # in flight at most: 2.6 ms at 25 GB/s, longer than a layer of a decode step takes
_PROBE_BYTES = 8 * 2**20
_PROBES = 3
_WATCH_EVERY = 16


@dataclasses.dataclass(frozen=True, slots=True)
class _Burst:
    """Copies that follow one another without a pause: since when, and how many blocks up to a certain one; smaller
    copies count as their share of a block."""

    began: float
    blocks: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    """A prefetch under way: its block, where that goes, when it was issued, and what was before it on the link."""

    block: jax.Array
    slot: int
    issued: float
    burst: _Burst


class AsyncLink(DeviceLink):
    """A `PrefetchLink` of a real device.

    A prefetch is handed to the device at once, unless `blocks_ahead` are under way; the others wait in a queue. The
    device takes copies in turn, so that a demand copy has to wait for those before it: what bounds them is the
    window, which is what can begin before the next layer asks. Blocks that have come are noticed without waiting and
    enter their slots several at a time.

    Most demand copies are not waited for, because the program that reads their slots does so on the device. One in 16
    is, as every prefetch that comes late, every copy that a timeline is to show and the probe at construction: they
    tell how fast the link is, and that it still is there.

    Args:
      spec: the model.
      store: the blocks.
      device: whose memory they go to.
      slots: slots of the pool.
      timeout: seconds after which a copy that is waited for is given up.

    Attributes:
      prefetches_begun, prefetches_failed: see `PrefetchLink`.
      timeline: hears of every copy, if it is not None. A prefetch is over when that is noticed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        store: Store,
        device: jax.Device,
        *,
        slots: int,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        super().__init__(spec, store, device, slots=slots, mode="async")
        self.prefetches_begun = self.prefetches_failed = 0
        self._clock, self._timeout = WallClock(), timeout
        self._capacity = blocks_ahead(spec.block_bytes)
        self._queue: deque[tuple[Key, int]] = deque()
        self._flight: dict[Key, _Copy] = {}
        self._landed: list[Key] = []
        self._failed: list[Key] = []
        self._burst = self._demand = _Burst(0.0, 0)
        self._demand_until = self._last_end = 0.0
        self._finishes = 0
        self._meter = PaceMeter(self._probe(spec.experts.count))

    @property
    def pace(self) -> LinkPace:
        """See `PrefetchLink`."""
        return self._meter.pace

    def finish(self, blocks: Sequence[jax.Array] | Coming, slots: Sequence[int]) -> None:
        """See `DeviceLink`.

        Raises:
          LinkError: the copy was waited for and has failed, or has not come within the timeout, or a block cannot be
            had.
        """
        if isinstance(blocks, Coming):
            blocks = self._start(blocks.keys)
        if not blocks:
            return
        began = self._clock.now
        if self._finishes % _WATCH_EVERY == 0 or self.timeline is not None:
            self._watch(blocks)
        self._finishes += 1
        self._insert(blocks, slots)
        now = self._clock.now
        self.seconds += now - began
        self._meter.waited(now)

    def beside(self, layer: int, experts: Sequence[int], nbytes: int) -> float:
        """See `DeviceLink`."""
        blocks = len(experts) * nbytes / self.block_bytes
        self._demand = self._issue(blocks)
        self._demand_until = self._end_of(self._demand)
        self._meter.demand(blocks * self._meter.block_seconds)
        return super().beside(layer, experts, nbytes)

    def withdraw(self) -> list[Key]:
        """See `PrefetchLink`."""
        now = self._clock.now
        self._meter.begin_layer(now, served_at=self._demand_until)
        if self._idle():
            self._burst = _Burst(now, 0)
        keys = [key for key, _ in self._queue]
        self._queue.clear()
        return keys

    def arrived(self) -> list[Key]:
        """See `PrefetchLink`."""
        self._land()
        keys, self._landed = self._landed, []
        return keys

    def failed(self) -> list[Key]:
        """See `PrefetchLink`."""
        keys, self._failed = self._failed, []
        return keys

    def window(self) -> int:
        """Blocks that begin while the layer computes, by the mean times of blocks and layers; never more than the
        device memory that the plan has for them."""
        room = self._capacity - len(self._flight) - len(self._queue)
        block = self._meter.block_seconds or sys.float_info.min
        now = self._clock.now
        free_at = now if self._idle() else max(now, self._end_of(self._burst))
        computing = max(now, self._demand_until) + self._meter.layer_seconds
        return max(0, min(room, math.ceil((computing - free_at) / block)))

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """See `PrefetchLink`."""
        self._queue.extend(zip(keys, slots, strict=True))
        self._begin()
        self._meter.end_layer(self._clock.now)

    def wait(self, keys: Sequence[Key]) -> None:
        """See `PrefetchLink`; what takes longer than the timeout has failed."""
        began = self._clock.now
        last = began + self._timeout
        for key in keys:
            copy = self._flight.get(key)
            if copy is not None and not is_ready(copy.block) and self._comes(key, copy, last - self._clock.now):
                self._measure(copy.burst)
        self._land()
        self._landed = [key for key in self._landed if key not in keys]
        now = self._clock.now
        self.seconds += now - began
        self._meter.waited(now)

    def abandon(self) -> None:
        """See `PrefetchLink`."""
        for pending in (self._queue, self._flight, self._landed, self._failed):
            pending.clear()

    def _start(self, keys: list[Key]) -> list[jax.Array]:
        """See `DeviceLink`."""
        if not keys:
            return []
        self._demand = self._issue(len(keys))
        blocks = super()._start(keys)
        self._demand_until = self._end_of(self._demand)
        self._meter.demand(len(keys) * self._meter.block_seconds)
        return blocks

    def _begin(self) -> None:
        """Hand queued prefetches to the device, as many as may be under way."""
        count = min(len(self._queue), self._capacity - len(self._flight))
        if count <= 0:
            return
        part = [self._queue.popleft() for _ in range(count)]
        self.prefetches_begun += count
        issued, before = self._clock.now, self._issue(count)
        keys = [key for key, _ in part]
        self.request(keys)
        blocks = self._fetch_each(keys)
        for index, ((key, slot), block) in enumerate(zip(part, blocks, strict=True), 1 - count):
            if block is not None:
                self._flight[key] = _Copy(block, slot, issued, _Burst(before.began, before.blocks + index))

    def _fetch_each(self, keys: list[Key]) -> list[jax.Array | None]:
        """The blocks of prefetches, in one call if that goes well; None for those that fail."""
        try:
            return [*self.fetch(keys)]
        except LinkError:
            if len(keys) > 1:
                return [block for key in keys for block in self._fetch_each([key])]
            self._fail(keys[0])
            return [None]

    def _land(self) -> None:
        """Put the blocks that have come into their slots, and use the room that they leave."""
        now = self._clock.now
        blocks, slots = [], []
        for key, copy in list(self._flight.items()):
            if not is_ready(copy.block) and now - copy.issued < self._timeout:
                continue
            if not self._comes(key, copy, 0.0):
                continue
            del self._flight[key]
            blocks.append(copy.block)
            slots.append(copy.slot)
            self._landed.append(key)
            if self.timeline is not None:
                began, self._last_end = min(max(copy.issued, self._last_end), now), now
                self.timeline.span(PREFETCH, f"{key[0]}/{key[1]}", began, now, layer=key[0], expert=key[1])
        if blocks:
            self._insert(blocks, slots)
        self._begin()

    def _comes(self, key: Key, copy: _Copy, seconds: float) -> bool:
        """Whether a prefetched block comes within so many seconds; if not, it has failed."""
        try:
            if ready_within(copy.block, seconds):
                return True
        except COPY_ERRORS:
            pass
        self._fail(key)
        return False

    def _fail(self, key: Key) -> None:
        self._flight.pop(key, None)
        self._failed.append(key)
        self.prefetches_failed += 1

    def _watch(self, blocks: Sequence[jax.Array]) -> None:
        """Wait for a demand copy."""
        late = not is_ready(blocks[-1])
        try:
            come = all(ready_within(block, self._timeout) for block in blocks)
        except COPY_ERRORS as error:
            raise link_error(self._demanded, error) from error
        if not come:
            raise link_error(self._demanded, f"nothing has come for {self._timeout:g} s")
        now = self._demand_until = self._clock.now
        if late:
            self._measure(self._demand)
        self._show_demand(self._demanded_at, now)
        self._last_end = now

    def _issue(self, count: float) -> _Burst:
        """`count` more blocks go to the device; they, and what is before them."""
        if self._idle():
            self._burst = _Burst(self._clock.now, 0)
        self._burst = _Burst(self._burst.began, self._burst.blocks + count)
        return self._burst

    def _idle(self) -> bool:
        """Every copy is across, as far as can be seen: before the first of a layer, or once the slots are filled."""
        last = next(reversed(self._flight.values()), None)
        return self._burst.blocks == 0 or ((last is None or is_ready(last.block)) and is_ready(self.pool.latest))

    def _end_of(self, burst: _Burst) -> float:
        return burst.began + burst.blocks * self._meter.block_seconds

    def _measure(self, burst: _Burst) -> None:
        """The last block of a burst was waited for and has come just now."""
        self._meter.copied(burst.blocks, self._clock.now - burst.began)

    def _probe(self, experts: int) -> float:
        """Seconds a block, one way, with nothing else going on: the best of a few calls of a few megabytes."""
        count = max(1, min(MAX_INSERT, experts, _PROBE_BYTES // self.block_bytes))
        keys = [(0, expert) for expert in range(count)]
        self._store.request(keys)
        blocks = [self._store.block(*key) for key in keys]
        seconds = []
        for _ in range(1 + _PROBES):  # the first allocates
            began = time.perf_counter()
            jax.block_until_ready(jax.device_put(blocks, self._sharding))
            seconds.append(time.perf_counter() - began)
        return min(seconds) / count


def blocks_ahead(block_bytes: int) -> int:
    """Prefetched blocks under way at most, for whose device memory a plan has to account."""
    return max(2, min(MAX_INSERT, _AHEAD_BYTES // block_bytes))
