"""Prediction from the residual stream: the scores of coming layers' own routers, made into true probabilities."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from ef_jax.predict.calibration import LEVEL_SHIFT, LEVELS, USED, Calibration
from ef_jax.predict.history import History
from ef_jax.predict.log_odds import BINS

_TABLE = LEVELS * BINS
_EARLY = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # steps at which all tables are renewed
_SETTLED = 64  # the step from which on they take turns
_LONGEST_INTERVAL = 32  # steps from one turn to the next


class Pregate(History):
    """Pre-gate scores, calibrated, where there are any; `History` past them.

    What a score is worth depends on layer and distance, and on what else is known of the expert: far ahead, one that
    the step before used is twice as likely to be used as another of the same score. So experts are told apart by bin
    and by four levels of the probability that `History` gives, and the frequency of use of each kind, learned as the
    steps go by, is the probability (`Calibration`). One distance a layer and step is compared with what happened.

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.
      top_k: experts that a token uses, K.
      distances: distances for which bins come, H.
    """

    def __init__(self, *, layers: int, experts: int, top_k: int, distances: int) -> None:
        super().__init__(layers=layers, experts=experts)
        self._layers, self._distances, self._usual = layers, distances, np.float32(top_k / experts)
        self._calibration = Calibration(layers=layers, distances=distances)
        self._tables = self._calibration.tables.reshape(-1)
        self._held: list[UInt8[np.ndarray, "distances E"] | None] = [None] * (layers + 1)  # of this step, by source
        self._marks = np.zeros((layers, experts), np.uint8)
        self._kinds = np.zeros((layers, experts), np.intp)  # where an expert's bins are in the tables of distance 1
        self._first_kinds = (np.arange(layers) * (distances * _TABLE))[:, None]
        self._further = np.repeat((np.arange(distances) * _TABLE)[:, None], experts, axis=1)  # broadcasting is slower
        self._count, self._learned = 0, [0] * distances  # steps, and those at which tables were renewed

    def on_step(self, tokens: Sequence[int]) -> None:
        super().on_step(tokens)
        self._learn_worths()
        usual = np.maximum(self._this.mean(axis=1, keepdims=True), self._usual)
        level = (self._this > usual / 2).astype(np.uint8)
        level += self._this > usual
        level += self._this > 2 * usual
        np.left_shift(level, LEVEL_SHIFT, out=self._marks)
        np.multiply(level, np.intp(BINS), out=self._kinds, dtype=np.intp)
        self._kinds += self._first_kinds
        self._held = [None] * (self._layers + 1)

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        self._held[layer + 1] = bins

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        used = self._use(layer, rows)
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

    def _learn_worths(self) -> None:
        """Renew tables: all of them now and then at first, later one every few steps."""
        self._count += 1
        count, distances = self._count, self._distances
        if count < _SETTLED:
            due: Sequence[int] = range(distances) if count in _EARLY else ()
        else:
            interval = min(count // 16, _LONGEST_INTERVAL)
            due = () if count % interval else (count // interval % distances,)
        for distance in due:
            self._calibration.learn(distance + 1, (count - self._learned[distance]) / distances)
            self._learned[distance] = count
