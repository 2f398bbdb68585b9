"""`ReplayResult`: what one replay came to, a row of a sweep."""

import dataclasses
from typing import Any

from ef_jax.replay.capacity import Capacity


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a replay over a simulated link came to, counted steps of decoding only.

    Attributes:
      bandwidth: of the link, bytes a second.
      stall_seconds: time that steps waited for expert bytes. None of a bound: it has no clock.
      step_seconds: mean time of a step. None of a bound.
      tokens_per_second: None of a bound, and where steps take no time.
      link_utilisation: share of the time in which the link was busy. None of a bound, and where steps take no time.
      bytes_wasted: of blocks that were prefetched and left unused. None of a bound.
      stall_lower_seconds: no scheduler with this many slots, prefetching with the future in view, stalls less.
      stall_clairvoyant_seconds: a schedule with the future in view that can be had.
    """

    bandwidth: float
    stall_seconds: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    link_utilisation: float | None = None
    bytes_wasted: int | None = None
    stall_lower_seconds: float
    stall_clairvoyant_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """What one policy does with one cache size; counts are of decode steps.

    Attributes:
      policy: its name; of a bound, the bound's.
      bound: clairvoyant, so no policy to choose.
      capacity: the cache.
      batch: sequences side by side; None: as recorded.
      steps: decode steps.
      tokens: decoded tokens.
      hits: distinct experts by layer and step that were in a slot.
      late_hits: those that were on their way, and were waited for.
      misses: those that were fetched on demand.
      bytes: bytes over the link; None where the size of a block is not known.
      gap_closed: share of the way in hit rate from `lru` to `belady` at this capacity; None unless both were replayed.
      replay_seconds: time that the replay took.
      timing: what came of a simulated link; None without one.
    """

    policy: str
    bound: bool
    capacity: Capacity
    batch: int | None
    steps: int
    tokens: int
    hits: int
    late_hits: int
    misses: int
    bytes: int | None
    gap_closed: float | None = None
    replay_seconds: float
    timing: Timing | None = None

    @property
    def accesses(self) -> int:
        """Distinct experts by layer and step that were needed."""
        return self.hits + self.late_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of the accesses that were hits; 0 where there was none."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def token_cycle(self) -> float:
        """Mean of the distinct experts that a step needs over all layers."""
        return self.accesses / self.steps if self.steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "capacity": self.capacity.share,
            "slots": self.capacity.slots,
            "policy": self.policy,
            "bound": self.bound,
            "batch": self.batch,
            "hit_rate": self.hit_rate,
            "hits": self.hits,
            "late_hits": self.late_hits,
            "misses": self.misses,
            "accesses": self.accesses,
            "bytes": self.bytes,
            "steps": self.steps,
            "tokens": self.tokens,
            "misses_per_token": self.misses / self.tokens if self.tokens else 0.0,
            "gap_closed": self.gap_closed,
            "replay_seconds": self.replay_seconds,
            **({} if self.timing is None else dataclasses.asdict(self.timing)),
        }
