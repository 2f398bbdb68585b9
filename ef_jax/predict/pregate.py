"""Prediction from the residual stream: the scores of coming layers' own routers, made into true probabilities."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from ef_jax.predict.calibration import LEVEL_SHIFT, LEVELS, USED, Calibration, levels
from ef_jax.predict.log_odds import BINS
from ef_jax.predict.paths import Paths, due

_TABLE = LEVELS * BINS


class Pregate(Paths):
    """Pre-gate scores and predicted paths as one estimate, from whichever there are; `History` where there are none.

    What a score is worth depends on layer and distance, and on what else is known of the expert. That is its path,
    known for all layers when the step begins, or else what `History` expects: far ahead, an expert that the step before
    used is twice as likely to be used as another of the same score. So experts are told apart by bin and by eight
    levels of the probability that they had when the step began (`calibration.levels`), and the frequency of use of each
    kind, learned as the steps go by, is the probability (`Calibration`). One distance a layer and step is compared with
    what happened. Layers for which there are no scores yet keep what the paths say.

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.
      top_k: experts that a token uses, K.
      distances: distances for which bins come, H.
    """

    def __init__(self, *, layers: int, experts: int, top_k: int, distances: int) -> None:
        super().__init__(layers=layers, experts=experts, top_k=top_k)
        self._layers, self._distances = layers, distances
        self._calibration = Calibration(layers=layers, distances=distances)
        self._tables = self._calibration.tables.reshape(-1)
        self._held: list[UInt8[np.ndarray, "distances E"] | None] = [None] * (layers + 1)  # of this step, by source
        self._marks = np.zeros((layers, experts), np.uint16)
        self._kinds = np.zeros((layers, experts), np.intp)  # where an expert's bins are in the tables of distance 1
        self._first_of_layer = (np.arange(layers) * (distances * _TABLE))[:, None]
        self._further = np.repeat((np.arange(distances) * _TABLE)[:, None], experts, axis=1)  # broadcasting is slower
        self._learned = [0] * distances  # steps at which tables were renewed

    def on_step(self, tokens: Sequence[int]) -> None:
        super().on_step(tokens)
        for distance in due(self._count, self._distances):
            self._calibration.learn(distance + 1, (self._count - self._learned[distance]) / self._distances)
            self._learned[distance] = self._count
        self._held = [None] * (self._layers + 1)
        self._tell_apart()

    def on_paths(self, bins: UInt8[np.ndarray, "L E"], following: UInt8[np.ndarray, "L E"] | None = None) -> None:
        super().on_paths(bins, following)
        self._tell_apart()

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        self._held[layer + 1] = bins

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        used = self._use(layer, rows)
        self._learn_path(layer, used)
        if not self._distances:
            return
        distance = 1 + (self._count + layer) % min(self._distances, layer + 1)
        bins = self._held[layer + 1 - distance]
        if bins is not None:
            marks = self._marks[layer]
            marks[used] |= USED
            self._calibration.observe(layer, distance, bins[distance], marks)

    def ahead(self, layer: int, horizon: int) -> Float32[np.ndarray, "horizon E"]:
        first = layer + 1
        bins = self._held[first]
        count = min(horizon, self._distances, self._layers - first)
        if bins is not None and count > 0:
            places = bins[1 : count + 1].astype(np.intp)
            places += self._kinds[first : first + count]
            places += self._further[:count]
            self._tables.take(places, out=self._this[first : first + count], mode="clip")
        return super().ahead(layer, horizon)

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        return self.ahead(-1, self._layers)

    def _tell_apart(self) -> None:
        """Take note of what is known of the experts besides their scores."""
        level = levels(self._this, self._usual)
        np.left_shift(level, LEVEL_SHIFT, out=self._marks)
        np.multiply(level, np.intp(BINS), out=self._kinds, dtype=np.intp)
        self._kinds += self._first_of_layer
