"""Least frequently recently used."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from ef_jax.memory.policies.ranked import Ranked, Rows, views


class Lfru(Ranked):
    """Evicts the key of the lowest frequency over age: its uses so far, divided by the time since the last of them.

    The name stands for several policies. This is the score, frequency weighted by recency, which needs no constants;
    the other kind parts the cache into a privileged LRU list and an unprivileged LFU list (Bilal and Kang,
    arXiv:1702.04078). An LFRU is what vLLM's pull request 37190 caches experts by, and what Zhang (arXiv:2608.07911)
    measures against Belady's bound. Uses are not decayed, count hits and misses alike, and are kept when a key leaves.
    Time is counted in layers that ran, so ages compare across layers.

    Attributes:
      floor_share: 1.0. While counts are small, age leads, and one order of ages over all layers falls to few hits
        below one token cycle.
    """

    floor_share = 1.0

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._uses = np.zeros((layers, experts))
        self._last = np.zeros((layers, experts))
        self._uses_of, self._last_of = views(self._uses), views(self._last)
        self._clock = 0

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._clock = clock = self._clock + 1
        uses, last = self._uses_of[layer], self._last_of[layer]
        for row in rows:
            for expert in row:
                uses[expert] += 1
                last[expert] = clock

    def on_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        self._clock += 1
        self._uses[layer] += counts
        self._last[layer][counts > 0] = self._clock

    def on_enter(self, layer: int, expert: int) -> None:
        super().on_enter(layer, expert)
        self._last_of[layer][expert] = self._clock

    def rank(self, layers: Rows) -> Float64[np.ndarray, "N E"]:
        return self._uses[layers] / (self._clock + 1 - self._last[layers])
