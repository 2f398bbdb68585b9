"""How often an expert that a step needs is in its slot: from the cache's size alone, or by replaying a trace."""

import dataclasses
import math

import numpy as np

from ef_jax.errors import InputError
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import RoutingTrace
from ef_jax.spec import ModelSpec

# Of `lru` at batch 1 with slots for 12.5, 25 and 50 % of the experts: (place of the cache, hits beyond chance), see
# `prior_hit_rate`. Hit rates: bench/results/policies.json and policies_deepseek_v2_lite.json.
_SMALL_MOE = ((0.0, 0.135), (0.333, 0.188), (0.667, 0.341))  # hits 24.3, 39.1, 67.1 %; E = 32, K = 4
_DEEPSEEK_V2_LITE = ((0.122, 0.217), (0.414, 0.316), (0.707, 0.451))  # hits 31.5, 48.7, 72.5 %; E = 64, K = 6
_BEYOND_CHANCE_AT_ALL = 0.65  # both curves lead there: DeepSeek-V2-Lite with 75 % of the experts is at (0.88, 0.56)
_DECAY = 1.8  # below a token cycle: 13 % beyond chance at place -0.17, DeepSeek-V2-Lite with 6.25 % of the experts

# Of sequences that run together each leaves less of a habit in the cache: what is beyond chance falls with the share of
# the experts that a step leaves alone (as `distinct_experts` has it), to the power 0.7 to 1.2 on the bundled model
# (batch 8) and 1.9 to 3.9 on DeepSeek-V2-Lite (batches of 4 and 6), with slots for 12.5 to 50 % of the experts.
_CROWDING = (3.9, 2.0, 0.7)  # at worst, expected, at best
_OTHER_MODELS = 0.25  # two models are few: the band goes so far beyond them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HitRate:
    """Share of the distinct experts that a layer of a step needs which are in slots: as expected, at worst, at best."""

    expected: float
    low: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.expected <= self.high <= 1:
            raise InputError(f"hit rates {self.low}, {self.expected}, {self.high}: must rise from 0 to 1")


def distinct_experts(experts: int, top_k: int, tokens: float) -> float:
    """Distinct experts that `tokens` tokens use in a layer: `E (1 - (1 - K/E)^tokens)`, as if each chose evenly.

    Real routing is less even: DeepSeek-V2-Lite uses 2 % fewer at 4 sequences and 6 % fewer at 6, the bundled model
    10 % fewer at 8.
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def prior_hit_rate(spec: ModelSpec, slots: int, batch: int) -> HitRate:
    """What `lru` can be expected to hit, by the sizes of cache and model alone.

    With S slots for N experts, `hits = s + (1 - s) g`: a share `s = S / N` by chance, and of the others a share g
    because the next token uses what the last one did. At batch 1, g is measured on two models at three sizes each, and
    read off in between at the place `y = log(S / C) / log(N / C)` of the cache between one token cycle C and all
    experts; `y < 0`, less than a cycle, decays as `exp(1.8 y)`. With c of a layer's experts in use in a step, a share,
    g is multiplied by `((1 - c) / (1 - K/E))^2`.

    Expected is the mean of both models. The band is their spread, the spread of that exponent (0.7 to 3.9), and a
    quarter of g besides.
    """
    experts = len(spec.step_moe_layers) * spec.experts.count
    slots = min(slots, experts)
    source = f"a prior from the cache's size: lru on two models, {slots} slots for {experts} experts"
    if slots == experts:
        return HitRate(expected=1.0, low=1.0, high=1.0, source="every expert has a slot")
    if slots == 0:
        return HitRate(expected=0.0, low=0.0, high=0.0, source="no expert has a slot")
    chance = slots / experts
    alone = spec.experts.top_k / spec.experts.count
    place = math.log(chance / alone) / math.log(1 / alone) if alone < 1 else 0.0
    curves = sorted(_beyond_chance(curve, place) for curve in (_SMALL_MOE, _DEEPSEEK_V2_LITE))
    used = distinct_experts(spec.experts.count, spec.experts.top_k, batch) / spec.experts.count
    left = (1 - used) / (1 - alone) if alone < 1 else 0.0
    worst, expected, best = (
        min(1.0, beyond * left**power)
        for beyond, power in zip(
            (curves[0] * (1 - _OTHER_MODELS), sum(curves) / 2, curves[1] * (1 + _OTHER_MODELS)), _CROWDING, strict=True
        )
    )
    low, middle, high = (chance + (1 - chance) * beyond for beyond in (worst, expected, best))
    return HitRate(expected=middle, low=low, high=high, source=source)


def replayed_hit_rate(spec: ModelSpec, trace: RoutingTrace, slots: int, batch: int) -> HitRate:
    """What `lru` hits in a replay of recorded routing, every token as a step of decoding.

    The band is what the two halves of the sequences come to by themselves.

    Raises:
      InputError: the trace is of a model of another shape.
    """
    ours = (len(spec.step_moe_layers), spec.experts.count, spec.experts.top_k)
    theirs = (trace.layers, trace.num_experts, trace.top_k)
    if ours != theirs:
        raise InputError(
            f"the trace is of {theirs[0]} layers of {theirs[1]} experts, top-{theirs[2]}, and the model has {ours[0]} "
            f"of {ours[1]}, top-{ours[2]}: give a trace of this model"
        )
    experts = ours[0] * ours[1]
    if not 0 < slots < experts:
        return prior_hit_rate(spec, slots, batch)
    trace = dataclasses.replace(trace, weights=None, pregate=None)
    middle = trace.sequences // 2
    parts = [trace, trace.select(0, middle), trace.select(middle)] if middle else [trace]
    rates = [_replay(part, slots, batch) for part in parts]
    source = f"a replay of {trace.count} recorded tokens with lru and {slots} slots"
    return HitRate(expected=rates[0], low=min(rates), high=max(rates), source=source)


def _beyond_chance(curve: tuple[tuple[float, float], ...], place: float) -> float:
    places, shares = zip(*curve, (1.0, _BEYOND_CHANCE_AT_ALL), strict=True)
    first = float(shares[0]) * math.exp(_DECAY * min(0.0, place - places[0]))
    return first if place <= places[0] else float(np.interp(place, places, shares))


def _replay(trace: RoutingTrace, slots: int, batch: int) -> float:
    phase = simulate(trace, slots=slots, policy="lru", batch=batch).decode
    hits, misses = sum(phase.hits), sum(phase.misses)
    return hits / (hits + misses)
