"""Predictions of a chosen quality for traces that have none: graded, true on average, worse further ahead."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32

from ef_jax.predict import History

Routes = Sequence[Sequence[Sequence[int]]]

# Recall of the six best of 64 by these: 0.90, 0.84, 0.79, 0.74, 0.70 and 0.68, as of good pre-gates.
SEPARATION = (3.5, 3.1, 2.8, 2.6, 2.4, 2.3)


class Graded(History):
    """Scores that are one normal variable for experts that are used and another for the others, as probabilities.

    Each expert of a coming layer has a score with variance 1, and with a mean that is larger by `separation[d - 1]` if
    the layer will use it. The probability that is told is the one that follows from the score by Bayes' rule. Errors
    are the same for all distances to four fifths. Past the running step, and past these distances, it is `History`.

    Args:
      steps: the decode steps that will be run, in order: `[L][B][K]` expert ids each.
      layers: MoE layers, L.
      experts: experts a layer, E.
      separation: by distance.
      seed: of the errors.
    """

    _SAME = 0.8

    def __init__(
        self,
        steps: Iterable[Routes],
        *,
        layers: int,
        experts: int,
        separation: Sequence[float] = SEPARATION,
        seed: int = 0,
    ) -> None:
        super().__init__(layers=layers, experts=experts)
        self._steps_to_come, self._separation = iter(steps), separation
        self._random = np.random.default_rng(seed)
        self._shape = layers, experts
        self._told = np.zeros((len(separation), layers, experts), np.float32)

    def on_step(self, tokens: Sequence[int]) -> None:
        super().on_step(tokens)
        used = np.zeros(self._shape, np.float32)
        for row, routes in zip(used, next(self._steps_to_come), strict=True):
            row[[expert for each in routes for expert in each]] = 1
        odds = used.mean() / (1 - used.mean())
        error = self._random.standard_normal(self._shape, np.float32)
        for told, mean in zip(self._told, self._separation, strict=True):
            log_odds = np.log(odds) + mean * (mean * used + error) - mean * mean / 2
            told[:] = 1 / (1 + np.exp(-log_odds))
            fresh = self._random.standard_normal(self._shape, np.float32)
            error = self._SAME * error + np.float32(np.sqrt(1 - self._SAME**2)) * fresh

    def ahead(self, layer: int, horizon: int) -> Float32[np.ndarray, "horizon E"]:
        scores = super().ahead(layer, horizon)
        seen = min(horizon, len(self._told), self._shape[0] - 1 - layer) if layer >= 0 else 0
        if seen > 0:
            scores = scores.copy()
            distances = np.arange(seen)
            scores[:seen] = self._told[distances, layer + 1 + distances]
        return scores
