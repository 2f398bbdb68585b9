"""The order in which copies cross one link, and when each is across: a model of the link on any clock."""

import math
import sys
from collections import deque
from collections.abc import Sequence

from ef_jax.memory.policies import Key
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.pace import LinkPace, PaceMeter
from ef_jax.schedule.wall_clock import Clock
from ef_jax.timeline import DEMAND, PREFETCH, Timeline


class LinkQueue:
    """One link's calls, one after another. A started copy is known by when it is across.

    A demand copy begins when the call under way ends, and overtakes every prefetch that has not begun. Nothing happens
    between calls of its methods, so what has begun in the meantime is worked out at the next one.

    Attributes:
      model: the link's figures; see `set_model`.
      bytes_moved: bytes of the copies that have begun.
      prefetches_begun: blocks whose prefetch has begun.
      seconds: seconds that callers have waited.
      timeline: hears of every copy, if it is not None.
    """

    def __init__(self, model: LinkModel, clock: Clock, *, block_bytes: int) -> None:
        self.model, self.clock = model, clock
        self.bytes_moved = self.prefetches_begun = 0
        self.seconds = 0.0
        self.timeline: Timeline | None = None
        self._block_bytes = block_bytes
        self._block_seconds = model.block_seconds(block_bytes)
        self._free_at = self._busy = self._demand_until = self._queued_at = 0.0
        self._queue: deque[Key] = deque()
        self._across: dict[Key, float] = {}
        self._unseen: deque[tuple[float, int, float]] = deque()
        self._meter = PaceMeter(model.latency / model.in_flight + self._block_seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds up to now in which a call was under way."""
        self._begin_prefetches()
        return self._busy - max(0.0, self._free_at - self.clock.now)

    @property
    def pace(self) -> LinkPace:
        """Measured from the copies that have come across and the layers that have been served; the first figure of
        `block_seconds` is what a probe of full calls would find."""
        self._see()
        return self._meter.pace

    def set_model(self, model: LinkModel) -> None:
        """The link is another one for every call that begins from now on."""
        self._begin_prefetches()
        self.model, self._block_seconds = model, model.block_seconds(self._block_bytes)

    def demand(self, layer: int, experts: Sequence[int]) -> float:
        """Begin a demand copy as soon as the call under way ends; returns when it is across."""
        self._begin_prefetches()
        if not experts:
            return self.clock.now
        begin = max(self.clock.now, self._free_at)
        self._call(len(experts), begin)
        self._meter.demand(self._free_at - begin)
        self._demand_until = self._free_at
        if self.timeline is not None:
            self.timeline.span(DEMAND, f"layer {layer}", begin, self._free_at, layer=layer, experts=list(experts))
        return self._free_at

    def beside(self, layer: int, experts: Sequence[int], nbytes: int) -> float:
        """As `demand`, of other bytes than the blocks' own, `nbytes` an expert; returns when they are across."""
        self._begin_prefetches()
        begin = max(self.clock.now, self._free_at)
        seconds = self.model.latency + len(experts) * self.model.block_seconds(nbytes)
        self._free_at = self._demand_until = begin + seconds
        self._busy += seconds
        self.bytes_moved += len(experts) * nbytes
        self._meter.demand(seconds)
        if self.timeline is not None:
            name = f"layer {layer}, {nbytes} bytes each"
            self.timeline.span(DEMAND, name, begin, self._free_at, layer=layer, experts=list(experts))
        return self._free_at

    def withdraw(self) -> list[Key]:
        """See `PrefetchLink`."""
        self._meter.begin_layer(self.clock.now)
        self._begin_prefetches()
        keys = list(self._queue)
        self._queue.clear()
        return keys

    def arrived(self) -> list[Key]:
        """See `PrefetchLink`."""
        self._begin_prefetches()
        now = self.clock.now
        keys = [key for key, time in self._across.items() if time <= now]
        for key in keys:
            del self._across[key]
        return keys

    def window(self) -> int:
        """Blocks that begin while the layer computes, if that takes the mean time between two layers."""
        self._see()
        block = self._meter.block_seconds
        if not block:
            return sys.maxsize
        now = self.clock.now
        computing = max(now, self._demand_until) + self._meter.layer_seconds
        return max(0, math.ceil((computing - max(now, self._free_at)) / block))

    def enqueue(self, keys: Sequence[Key]) -> None:
        """Queue prefetches, the most urgent first."""
        self._begin_prefetches()
        self._queue.extend(keys)
        self._queued_at = self.clock.now
        self._meter.end_layer(self._queued_at)

    def take(self, key: Key) -> float:
        """When a prefetch that has begun is across; `arrived` does not tell of it."""
        self._begin_prefetches()
        return self._across.pop(key)

    def abandon(self) -> None:
        """See `PrefetchLink`; what is under way still occupies the link."""
        self._begin_prefetches()
        self._queue.clear()
        self._across.clear()

    def wait_until(self, time: float) -> None:
        """Wait for a copy that is across at `time`."""
        self.seconds += self.clock.wait_until(time)
        self._meter.waited(self.clock.now)

    def _begin_prefetches(self) -> None:
        """Begin what has had its turn before now: each call when the one before it has ended."""
        while self._queue:
            begin = max(self._free_at, self._queued_at)
            if begin >= self.clock.now:
                return
            count = min(self.model.in_flight, len(self._queue))
            self._call(count, begin)
            self.prefetches_begun += count
            for left in range(count - 1, -1, -1):
                key = self._queue.popleft()
                self._across[key] = end = self._free_at - left * self._block_seconds
                if self.timeline is not None:
                    layer, expert = key
                    first = begin if left == count - 1 else end - self._block_seconds
                    self.timeline.span(PREFETCH, f"{layer}/{expert}", first, end, layer=layer, expert=expert)

    def _call(self, blocks: int, begin: float) -> None:
        self._see()
        seconds = self.model.latency + blocks * self._block_seconds
        self._free_at = begin + seconds
        self._busy += seconds
        self.bytes_moved += blocks * self._block_bytes
        self._unseen.append((self._free_at, blocks, seconds))

    def _see(self) -> None:
        """Measure the calls that have ended."""
        now = self.clock.now
        while self._unseen and self._unseen[0][0] <= now:
            _, blocks, seconds = self._unseen.popleft()
            self._meter.copied(blocks, seconds)
