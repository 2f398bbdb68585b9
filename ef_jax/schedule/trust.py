"""How far a predictor's probabilities can be trusted, by distance: measured, whatever predictor it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

_EVERY = 3
_MEMORY = 64  # layers of steps, of one distance, that the measure reaches back


class _Told(NamedTuple):
    distance: int
    scores: Float32[np.ndarray, "E"]


class Trust:
    """The factor that makes probabilities true on average: the slope, through zero, of uses over probabilities.

    It is 1 for a predictor whose probabilities are frequencies, below 1 for one that claims too much, and 0 for one
    that is always wrong. What it claims too little is left at that. One distance of every third layer is looked at, in
    turn.

    Args:
      layers: MoE layers, L.
      distances: distances that are told apart; those beyond count as the last.

    Attributes:
      of: the factor, by distance, from 1 on; 1 before anything was seen.
    """

    def __init__(self, *, layers: int, distances: int) -> None:
        self._layers = layers
        self._distances = distances
        self._told: list[_Told | None] = [None] * layers
        self._products, self._squares = [1.0] * distances, [1.0] * distances  # with one observation to begin with
        self._seen = [1] * distances
        self._turn = 0
        self.of = [1.0] * distances

    def told(self, layer: int, scores: Float32[np.ndarray, "distances E"]) -> None:
        """The predictor gave `scores` to the layers after `layer`."""
        self._turn += 1
        if self._turn % _EVERY:
            return
        distance = 1 + self._turn // _EVERY % min(self._distances, len(scores))
        target = (layer + distance) % self._layers
        before = self._told[target]
        if before is None or before.distance >= distance:
            self._told[target] = _Told(distance, scores[distance - 1].copy())

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` used the distinct `experts`."""
        if (told := self._told[layer]) is None:
            return
        self._told[layer] = None
        place, scores = told.distance - 1, told.scores
        seen = self._seen[place] = min(self._seen[place] + 1, _MEMORY)
        products, squares = self._products, self._squares
        products[place] += (float(scores[experts].sum()) - products[place]) / seen
        squares[place] += (float(scores.dot(scores)) - squares[place]) / seen
        self.of[place] = min(1.0, products[place] / max(squares[place], 1e-9))
