"""Slots shared out among the layers by need."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int

from ef_jax.memory.policies.base import Key
from ef_jax.memory.policies.ranked import TIER, Rows, predicted, views
from ef_jax.memory.policies.recent import Recent


class Plec(Recent):
    """Gives each layer a quota of slots by its need, after ExpertFlow-H's PLEC (arXiv:2410.17954).

    The least recently used keys of layers above their quota leave, those of the asking layer when it has used up its
    own; where one step needs more of a layer than its quota, the rest pass through staging. With predictions the need
    of a layer is the sum of its probabilities; keys that were predicted and not used leave first of all; layers that
    have run have no need left in the step, so that the later ones take their slots at once; keys that are predicted
    for layers to come leave last. A key that is used and was not predicted is loaded at once, like any other.

    Without predictions need is estimated from the past: the effective number of experts that a layer uses,
    (sum f)^2 / sum f^2 of their decayed frequencies f.

    Attributes:
      half_life: decode steps, as for `Lfu`.
      floor_share: 0.25. The quotas share out the cache, and keep a layer from losing all; the floor holds them off
        where layers that have run lose to later ones.
    """

    floor_share = 0.25
    wants_predictions = True
    half_life = 64

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._frequency = np.zeros((layers, experts))
        self._mark = np.zeros((layers, experts))  # TIER: predicted and to come; -TIER: predicted and not used
        self._frequency_of, self._mark_of = views(self._frequency), views(self._mark)
        self._excess = [0] * layers  # resident keys above the quota
        self._quotas = [0] * layers
        self._take(quotas(np.ones(layers), slots=cache_slots, most=experts))
        self._period = max(1, self.half_life // 8)  # steps between estimates of need, which change by half_life
        self._steps = 0
        self._running, self._predicting = -1, False

    def on_step(self, tokens: Sequence[int]) -> None:
        self._running = -1
        self._steps += 1
        if self._predicting:
            self._predicting = False
            self._mark.fill(0)
        if self._steps % self._period == 0:
            self._frequency *= 0.5 ** (self._period / self.half_life)
            total, squares = self._frequency.sum(axis=1), np.square(self._frequency).sum(axis=1)
            need = np.divide(total * total, squares, out=np.zeros(self.layers), where=squares > 0)
            self._take(quotas(need, slots=self.cache_slots, most=self.experts))

    def on_predict(self, scores: Float32[np.ndarray, "L E"]) -> None:
        self._predicting = True
        self._mark[:] = predicted(scores) * TIER
        self._take(quotas(scores.sum(axis=1, dtype=np.float64), slots=self.cache_slots, most=self.experts))

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._running = layer
        last, frequency = self.last_of[layer], self._frequency_of[layer]
        self.before = clock = self.clock
        for row in rows:
            for expert in reversed(row):
                clock += 1
                last[expert] = clock
                frequency[expert] += 1
        self.clock = clock
        if self._predicting:
            mark = self._mark[layer]
            np.minimum(mark, -mark, out=mark)
            for row in rows:
                mark[row] = 0

    def on_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        self._frequency[layer] += counts
        super().on_prompt(layer, counts)

    def on_enter(self, layer: int, expert: int) -> None:
        super().on_enter(layer, expert)
        self._excess[layer] += 1

    def on_evict(self, layer: int, expert: int) -> None:
        super().on_evict(layer, expert)
        self._excess[layer] -= 1

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        above = [excess if excess > 0 else 0 for excess in self._excess]
        above[layer] = max(0, self._excess[layer] + len(missing))
        if self._predicting:
            above[: self._running + 1] = spare[: self._running + 1]
        return self.lowest(layer, len(missing), needed, list(map(min, above, spare)))

    def _take(self, quotas: list[int]) -> None:
        self._excess = [excess + old - new for excess, old, new in zip(self._excess, self._quotas, quotas, strict=True)]
        self._quotas = quotas

    def rank(self, layers: Rows) -> Float64[np.ndarray, "N E"]:
        if self._predicting:
            return self.last[layers] + self._mark[layers]
        return self.last[layers].copy()


def quotas(need: Float64[np.ndarray, "L"], *, slots: int, most: int) -> list[int]:
    """Whole slots for each layer in proportion to its need, by D'Hondt's method; without any need, in equal parts.

    Slots go one by one to the layer of the largest need / (slots so far + 1), the earlier one of equals. Needs of 3
    and 2 share 5 slots as 3 and 2, and 4 slots as 3 and 1: the worked examples of ExpertFlow-H.

    Args:
      need: not negative.
      slots: to be shared out, at most `L * most`.
      most: slots that one layer can use.
    """
    if not need.any():
        need = np.ones(len(need))
    share = np.zeros(len(need), np.int64)
    open_, left = need > 0, slots
    while open_.any():  # at this price too few slots are sold, so that all sales stand
        share[open_] = (need[open_] * (left / need[open_].sum()) + 1e-9).astype(np.int64)
        full = open_ & (share >= most)
        if not full.any():
            break
        share[full] = most
        open_ &= ~full
        left = slots - most * int((share == most).sum())
    for _ in range(slots - int(share.sum())):
        share[np.argmax(np.where(share < most, need / (share + 1), -1.0))] += 1
    return share.tolist()
