"""Least frequently used, with decay."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from ef_jax.memory.policies.ranked import Ranked, Rows, views

_REBASE = 512  # half-lives after which the numbers are scaled down; 2**512 is far below the largest float64


class Lfu(Ranked):
    """Evicts the key of the lowest decayed frequency: each use counts half as much `half_life` decode steps later.

    Uses count whether they hit or miss, so a key that left keeps its history. Nothing is swept: instead of decaying
    every number, a step's uses weigh more than those of the step before. Every row of a batch counts.

    Attributes:
      half_life: 64 decode steps, about a paragraph of text; llama.cpp's cache of experts takes 128. It was not fitted
        to a trace.
      floor_share: 1.0. A key that has just come has a low number. Where all layers share one order, the layers that
        follow take its slot before its own layer runs again; within its own layer it has a step to prove itself.
    """

    floor_share = 1.0
    half_life = 64

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self.frequency = np.zeros((layers, experts))
        self._rows = views(self.frequency)
        self._steps, self._weight, self._top_k = 0, 1.0, 1

    def on_step(self, tokens: Sequence[int]) -> None:
        self._steps += 1
        if self._steps == _REBASE * self.half_life:
            self._steps = 0
            self.frequency *= 2.0**-_REBASE
        self._weight = 2.0 ** (self._steps / self.half_life)

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        frequency, weight = self._rows[layer], self._weight
        for row in rows:
            for expert in row:
                frequency[expert] += weight
        self._top_k = len(rows[0])

    def on_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        """Lift frequencies to what decode steps with the prompt's mean would have come to; lower none."""
        steps = counts.sum() / self._top_k
        if steps:
            kept = 0.5 ** (1 / self.half_life)
            mass = self._weight * (1 - kept**steps) / (1 - kept)
            np.maximum(self.frequency[layer], counts / steps * mass, out=self.frequency[layer])

    def rank(self, layers: Rows) -> Float64[np.ndarray, "N E"]:
        return self.frequency[layers].copy()
