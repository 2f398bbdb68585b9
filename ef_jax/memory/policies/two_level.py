"""Two lists: keys that are likely to be used again, and the rest."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from ef_jax.memory.policies.ranked import TIER, Rows, predicted, views
from ef_jax.memory.policies.recent import Recent


class TwoLevel(Recent):
    """Evicts the least recently used key of a low list, then of a high one, after ExpertFlow-S (arXiv:2510.26730).

    A key is in the high list for one of two reasons. It is predicted for one of the next `window` layers; it goes back
    when its layer has run or the next prediction leaves it out. Or it was used recently, which here means: it was used
    again while it was resident, and since then fewer than half of its layer's keys were. Taken as age alone,
    recency would make both lists together plain LRU; counted by reuse they are a segmented LRU (Karedla, Love and
    Wherry 1994) with equal segments, so that the policy differs from LRU where no predictor is at work.

    Attributes:
      window: layers ahead whose predictions count: the horizon of the prefetches, as it moves. Where nothing is
        prefetched, 8, amid the 5 to 14 of ExpertFlow-S's formula for one sequence on 25 GB/s.
      floor_share: 1.0. Age leads within a list, and one list of ages over all layers falls to zero hits below one
        token cycle.
    """

    floor_share = 1.0
    wants_predictions = True
    window = 8

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._reused = np.zeros((layers, experts))  # TIER or 0
        self._ahead = np.zeros((layers, experts))  # likewise
        self._reused_of = views(self._reused)
        self._held: list[set[int]] = [set() for _ in range(layers)]
        self._high: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(layers)]
        self._named: Float64[np.ndarray, "L E"] | None = None

    def on_step(self, tokens: Sequence[int]) -> None:
        if self._named is not None:
            self._named = None
            self._ahead.fill(0)

    def on_predict(self, scores: Float32[np.ndarray, "L E"]) -> None:
        self._named = predicted(scores) * TIER
        self._ahead.fill(0)
        self._ahead[: self.window] = self._named[: self.window]

    def on_ahead(self, layer: int, scores: Float32[np.ndarray, "L E"]) -> None:
        if self._named is not None:
            following = slice(layer + 1, layer + 1 + self.window)
            self._named[following] = predicted(scores[: len(self._named[following])]) * TIER
            self._ahead[following] = self._named[following]

    def on_horizon(self, layers: float) -> None:
        self.window = max(1, round(layers))

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self.before = clock = self.clock
        last = self.last_of[layer]
        held, high = self._held[layer], self._high[layer]
        for row in rows:
            for expert in reversed(row):
                clock += 1
                last[expert] = clock
                if expert in held:
                    if expert in high:
                        high.move_to_end(expert)
                    else:
                        self._promote(layer, expert)
        self.clock = clock
        if self._named is not None:
            self._ahead[layer] = 0
            entering = slice(layer + 1, layer + 1 + self.window)
            self._ahead[entering] = self._named[entering]

    def on_enter(self, layer: int, expert: int) -> None:
        super().on_enter(layer, expert)
        self._held[layer].add(expert)

    def on_evict(self, layer: int, expert: int) -> None:
        super().on_evict(layer, expert)
        self._held[layer].remove(expert)
        self._high[layer].pop(expert, None)
        self._reused_of[layer][expert] = 0.0

    def rank(self, layers: Rows) -> Float64[np.ndarray, "N E"]:
        if self._named is None:
            return self.last[layers] + self._reused[layers]
        return self.last[layers] + np.maximum(self._reused[layers], self._ahead[layers])

    def _promote(self, layer: int, expert: int) -> None:
        high, reused = self._high[layer], self._reused_of[layer]
        high[expert] = None
        reused[expert] = TIER
        if 2 * len(high) > len(self._held[layer]):
            reused[high.popitem(last=False)[0]] = 0.0
