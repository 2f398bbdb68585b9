"""The link of a replay: a model of bandwidth and latency on a virtual clock."""

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Sequence

from ef_jax.errors import InputError
from ef_jax.memory.policies import Key
from ef_jax.replay.virtual_clock import VirtualClock

_GAP_WEIGHT = 1 / 8  # of the newest gap between layers in their mean: half of it is forgotten in five layers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinkModel:
    """How long copies take. One call runs at a time; of n blocks, it takes `latency + n x block_seconds`.

    Attributes:
      bandwidth: bytes a second, one way.
      latency: seconds that a call takes before its first block moves.
      block_overhead: seconds that each block takes besides its bytes.
      in_flight: prefetched blocks a call at most. A call that has begun ends before any other begins, so this is
        what a demand copy may have to wait for.

    Raises:
      InputError: a figure that no link has.
    """

    bandwidth: float
    latency: float = 0.0
    block_overhead: float = 0.0
    in_flight: int = 1

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise InputError(f"bandwidth {self.bandwidth} bytes/s: give more than 0")
        for name in ("latency", "block_overhead"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} s: give 0 or more seconds")
        if self.in_flight < 1:
            raise InputError(f"in_flight {self.in_flight}: give at least 1 block")

    def block_seconds(self, nbytes: int) -> float:
        """Seconds that a block of `nbytes` bytes occupies the link, latency left out."""
        return self.block_overhead + nbytes / self.bandwidth


class FreeLink:
    """A link that takes no time, for replays that only count."""

    bytes_moved = 0
    seconds = 0.0

    def start(self, layer: int, experts: Sequence[int]) -> None:
        pass

    def finish(self, blocks: None, slots: Sequence[int]) -> None:
        pass

    def settle(self) -> None:
        pass


class SimulatedLink:
    """A `PrefetchLink` whose copies take the time that a model says. A started copy is known by when it is across.

    A demand copy begins when the call under way ends, and overtakes every prefetch that has not begun. Nothing happens
    between calls of its methods, so what has begun in the meantime is worked out at the next one.

    Attributes:
      bytes_moved: bytes of the copies that have begun.
      prefetches_begun: blocks whose prefetch has begun.
      seconds: virtual seconds that callers have waited.
    """

    def __init__(self, model: LinkModel, clock: VirtualClock, *, block_bytes: int) -> None:
        self.model, self.clock = model, clock
        self.bytes_moved = self.prefetches_begun = 0
        self.seconds = 0.0
        self._block_bytes = block_bytes
        self._block_seconds = model.block_seconds(block_bytes)
        self._free_at = self._busy = self._demand_until = self._queued_at = 0.0
        self._queue: deque[Key] = deque()
        self._across: dict[Key, float] = {}
        self._gap = self._block_seconds
        self._left_at: float | None = None

    @property
    def busy_seconds(self) -> float:
        """Seconds up to now in which a call was under way."""
        self._begin_prefetches()
        return self._busy - max(0.0, self._free_at - self.clock.now)

    def start(self, layer: int, experts: Sequence[int]) -> float:
        self._begin_prefetches()
        if not experts:
            return self.clock.now
        self._call(len(experts), max(self.clock.now, self._free_at))
        self._demand_until = self._free_at
        return self._free_at

    def finish(self, blocks: float, slots: Sequence[int]) -> None:
        self._wait_until(blocks)

    def settle(self) -> None:
        pass

    def withdraw(self) -> list[Key]:
        if self._left_at is not None:
            self._gap += _GAP_WEIGHT * (self.clock.now - self._left_at - self._gap)
            self._left_at = None
        self._begin_prefetches()
        keys = list(self._queue)
        self._queue.clear()
        return keys

    def arrived(self) -> list[Key]:
        self._begin_prefetches()
        keys = [key for key, time in self._across.items() if time <= self.clock.now]
        for key in keys:
            del self._across[key]
        return keys

    def window(self) -> int:
        """Blocks that begin while the layer computes, if that takes the mean time between two layers."""
        block = self.model.latency / self.model.in_flight + self._block_seconds
        if not block:
            return sys.maxsize
        computing = max(self.clock.now, self._demand_until)
        return max(0, math.ceil((computing + self._gap - max(self.clock.now, self._free_at)) / block))

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        self._begin_prefetches()
        self._queue.extend(keys)
        self._queued_at = self._left_at = self.clock.now

    def wait(self, keys: Sequence[Key]) -> None:
        self._begin_prefetches()
        self._wait_until(max((self._across.pop(key) for key in keys), default=self.clock.now))

    def _wait_until(self, time: float) -> None:
        self.seconds += self.clock.wait_until(time)
        if self._left_at is not None:
            self._left_at = self.clock.now

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
                self._across[self._queue.popleft()] = self._free_at - left * self._block_seconds

    def _call(self, blocks: int, begin: float) -> None:
        seconds = self.model.latency + blocks * self._block_seconds
        self._free_at = begin + seconds
        self._busy += seconds
        self.bytes_moved += blocks * self._block_bytes
