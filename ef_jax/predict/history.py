"""Prediction from what the layers used before, and nothing else."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64, UInt8


class History:
    """Decayed frequencies, corrected by what the step before used.

    The use y of an expert by a step, 0 or 1, is predicted as f + rho (x - f): f is the decayed frequency of its uses,
    x its use by the step before, and rho the correlation of the two deviations from f, measured as the steps go by,
    layer by layer. It is the best linear predictor of the two.

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.
      half_life: steps after which a use counts half in the frequencies.
    """

    def __init__(self, *, layers: int, experts: int, half_life: float = 64.0) -> None:
        self._rate = np.float32(1 - 0.5 ** (1 / half_life))
        self._steps = 0
        self._frequency = np.zeros((layers, experts), np.float32)
        self._last = np.zeros((layers, experts), np.float32)
        self._now = np.zeros((layers, experts), np.float32)
        self._products = np.zeros((layers, 1), np.float32)
        self._squares = np.full((layers, 1), 1e-6, np.float32)
        self._rho = np.zeros((layers, 1), np.float32)
        self._unused = np.zeros((layers, experts), np.float32)  # what is predicted for what a step did not use
        self._scores = np.zeros((2 * layers, experts), np.float32)  # of this step, and below it of the next
        self._this, self._next = self._scores[:layers], self._scores[layers:]

    def on_step(self, tokens: Sequence[int]) -> None:
        if self._now.any():
            self._learn()
        trust = self._rho * self._last
        np.add(self._unused, trust, out=self._this)
        np.add(self._unused, self._rho * trust, out=self._next)  # until the layer has run

    def on_paths(self, bins: UInt8[np.ndarray, "L E"], following: UInt8[np.ndarray, "L E"] | None = None) -> None:
        pass

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        pass

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._use(layer, rows)

    def ahead(self, layer: int, horizon: int) -> Float32[np.ndarray, "horizon E"]:
        return self._scores[layer + 1 : layer + 1 + horizon]

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        return self._this

    def _use(self, layer: int, rows: Sequence[Sequence[int]]) -> Int64[np.ndarray, "n"]:
        """Take note of what a layer used; gives the ids, which may come twice."""
        used = np.array(rows[0] if len(rows) == 1 else list(itertools.chain.from_iterable(rows)), np.int64)
        now, following = self._now[layer], self._next[layer]
        now[used] = 1
        np.multiply(now, self._rho[layer, 0], out=following)
        following += self._unused[layer]
        return used

    def _learn(self) -> None:
        """Take the uses of a whole step into the statistics."""
        self._steps += 1
        rate = max(self._rate, np.float32(1 / self._steps))  # the plain mean, until that is the slower of the two
        deviation, before = self._now - self._frequency, self._last - self._frequency
        self._products += rate * ((deviation * before).mean(axis=1, keepdims=True) - self._products)
        self._squares += rate * ((before * before).mean(axis=1, keepdims=True) - self._squares)
        self._rho = np.clip(self._products / np.maximum(self._squares, 1e-6), 0, 1, dtype=np.float32)
        self._frequency += rate * deviation
        np.multiply(self._frequency, 1 - self._rho, out=self._unused)
        self._last, self._now = self._now, self._last
        self._now[:] = 0
