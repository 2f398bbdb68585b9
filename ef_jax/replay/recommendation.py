"""Which policy and how many slots a sweep speaks for, and what to beware of."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ef_jax.memory.rates import format_bandwidth
from ef_jax.replay.capacity import Capacity
from ef_jax.replay.result import ReplayResult

_NEARLY_BEST = 0.95

# A gain over uniform routing is real where it is more than half a point and more than four standard errors: a sweep
# looks at some dozens of hit rates, and the largest of so many errors is rarely beyond that.
_LEAST_GAIN = 0.005
_ERRORS = 4.0

_USES_PER_EXPERT = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A policy and a cache size, why, and what speaks against them; `warning` is empty where nothing does."""

    policy: str
    capacity: Capacity
    hit_rate: float
    reason: str
    warning: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "policy": self.policy,
            "capacity": self.capacity.share,
            "slots": self.capacity.slots,
            "hit_rate": self.hit_rate,
            "reason": self.reason,
            "warning": self.warning,
        }


def recommend(results: Sequence[ReplayResult]) -> Recommendation | None:
    """What the rows of a sweep over one link, or over none, speak for.

    With a link: the fewest slots whose tokens a second are within 5 % of the best of the sweep, and the policy that is
    the fastest with them. Without: the policy and capacity whose hit rate is furthest above the capacity, which is the
    hit rate of every policy under uniform routing; beyond it a slot brings less than the slots before it.

    Returns:
      None where only bounds were replayed.
    """
    online = [result for result in results if not result.bound]
    if not online:
        return None
    uniform = _looks_uniform(online)
    if online[0].timing is not None:
        best, reason = _fastest(online)
    elif uniform:
        best = max(online, key=lambda result: result.capacity.slots)  # of equals the first, which is the simplest
        reason = "no policy helps: hit rates are the capacity, so slots count only by their number; the most were taken"
    else:
        best = max(online, key=_gain)
        reason = (
            f"its hit rate is {100 * _gain(best):.1f} points above the {100 * best.capacity.share:.1f} % of uniform "
            "routing, the most of this sweep"
        )
    warnings = ["routing looks uniform: no policy helps"] if uniform else []
    if best.capacity.slots < best.token_cycle:
        warnings.append(_below_cycle(best))
    return Recommendation(
        policy=best.policy,
        capacity=best.capacity,
        hit_rate=best.hit_rate,
        reason=reason,
        warning="; ".join(warnings),
    )


def sweep_warnings(results: Sequence[ReplayResult], *, experts: int) -> list[str]:
    """What to beware of in a sweep: capacities below one token cycle, and a trace too short to say much.

    Args:
      results: rows of a sweep.
      experts: experts of the whole model, L * E.
    """
    warnings = {
        result.capacity.slots: _below_cycle(result) for result in results if result.capacity.slots < result.token_cycle
    }
    lines = [warnings[slots] for slots in sorted(warnings)]
    uses = results[0].accesses if results else 0
    if uses < _USES_PER_EXPERT * experts:
        lines.append(
            f"the trace counts {uses} uses of {experts} experts, so hit rates are much those of a cache that is still "
            f"filling: record {_USES_PER_EXPERT * experts} or more"
        )
    return lines


def _fastest(online: Sequence[ReplayResult]) -> tuple[ReplayResult, str]:
    """The fewest slots that are nearly as fast as any, under their fastest policy."""
    first = min(online, key=_step_seconds)
    enough = [result for result in online if _NEARLY_BEST * _step_seconds(result) <= _step_seconds(first)]
    fewest = min(result.capacity.slots for result in enough)
    best = min((result for result in enough if result.capacity.slots == fewest), key=_step_seconds)
    reason = "the fewest slots within 5 % of the best speed of this sweep"
    if first.timing is not None:
        if first.timing.tokens_per_second is not None:
            reason += f", {first.timing.tokens_per_second:.1f} tokens/s"
        reason += f" at {format_bandwidth(first.timing.bandwidth)}"
    return best, reason


def _step_seconds(result: ReplayResult) -> float:
    timing = result.timing
    return math.inf if timing is None or timing.step_seconds is None else timing.step_seconds


def _looks_uniform(online: Sequence[ReplayResult]) -> bool:
    """No hit rate is above its capacity by more than chance."""
    for result in online:
        share, uses = min(result.capacity.share, 1.0), max(result.accesses, 1)
        if _gain(result) > max(_LEAST_GAIN, _ERRORS * math.sqrt(share * (1 - share) / uses)):
            return False
    return True


def _gain(result: ReplayResult) -> float:
    return result.hit_rate - result.capacity.share


def _below_cycle(result: ReplayResult) -> str:
    return (
        f"{result.capacity.slots} slots are fewer than the {result.token_cycle:.0f} experts that one step touches: "
        "most are evicted before they are needed again"
    )
