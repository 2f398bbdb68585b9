"""Candidates by rules that know no costs: the nearest layer first, of a layer the likeliest expert first."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32

from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Residency

_THRESHOLD = 0.5
_SHARE = 0.9

Rule = Callable[[Float32[np.ndarray, "E"]], Bool[np.ndarray, "E"]]


def threshold(scores: Float32[np.ndarray, "E"]) -> Bool[np.ndarray, "E"]:
    """Experts that are used more often than not."""
    return scores >= _THRESHOLD


def top_k(scores: Float32[np.ndarray, "E"]) -> Bool[np.ndarray, "E"]:
    """The likeliest experts, as many as the probabilities add up to; of equals, the first."""
    return _best(scores, round(float(scores.sum())))


def cumulative(scores: Float32[np.ndarray, "E"]) -> Bool[np.ndarray, "E"]:
    """The likeliest experts that together have 90 % of all probability, the N_e of ExpertFlow-S (arXiv:2510.26730),
    whose own share is not told."""
    covered = np.cumsum(np.sort(scores)[::-1])
    return _best(scores, int(np.searchsorted(covered, _SHARE * covered[-1])) + 1 if covered[-1] > 0 else 0)


RULES: dict[str, Rule] = {"threshold": threshold, "top_k": top_k, "cumulative": cumulative}


class NearestFirst:
    """Fetches what a rule names, by nearness, into slots that the cache's policy gives up.

    Layers that run before the one that a block is for lose nothing for it, and none that is named leaves for another
    of its layer.

    Args:
      residency: which block is where.
      rule: names the experts of a layer that are worth a copy.
    """

    def __init__(self, residency: Residency, rule: Rule) -> None:
        self._residency, self._rule = residency, rule

    def choose(
        self,
        layer: int,
        needed: Sequence[int],
        ahead: Float32[np.ndarray, "L E"],
        reach: Sequence[int],
        room: int,
    ) -> tuple[list[Key], list[int]]:
        """See `ByValue.choose`."""
        residency, layers = self._residency, self._residency.layers
        keys: list[Key] = []
        slots: list[int] = []
        closed: list[int] = []
        for distance, scores in enumerate(ahead[: max(reach, default=0)], 1):
            closed.append((layer + distance - 1) % layers)
            target = (layer + distance) % layers
            if reach[target] < distance:
                continue
            named = self._rule(scores)
            absent = (named & (residency.slot_of[target] < 0)).nonzero()[0]
            if not absent.size:
                continue
            keep = named.nonzero()[0].tolist()
            if target == layer:
                keep += needed
            for expert in absent[np.argsort(-scores[absent], kind="stable")].tolist():
                slot = residency.reserve(target, expert, keep=keep, closed=closed)
                if slot is not None:
                    keys.append((target, expert))
                    slots.append(slot)
                    if len(keys) == room:
                        return keys, slots
        return keys, slots


def _best(scores: Float32[np.ndarray, "E"], count: int) -> Bool[np.ndarray, "E"]:
    named = np.zeros(len(scores), bool)
    named[np.argsort(-scores, kind="stable")[:count]] = True
    return named
