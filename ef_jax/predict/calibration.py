"""What scores are worth: how often experts were used whose score fell into a bin, learned as the steps go by."""

import numpy as np
from jaxtyping import Float32, Float64, UInt8, UInt16

from ef_jax.predict.log_odds import BINS, NOMINAL

_LEVEL_ODDS = np.exp([-2, -1, -1 / 3, 1 / 3, 1, 2, 3.5]).astype(np.float32)

LEVELS = len(_LEVEL_ODDS) + 1
"""Kinds of experts of a layer that are told apart besides their bins, see `levels`."""

USED, LEVEL_SHIFT = 32, 6
"""Marks of an expert: this bit where it was used, and its level shifted left by that many bits."""

_WIDTH = 3  # bits of a bin that are not told apart: 8 bins are half a unit of log-odds
_GROUPS = BINS >> _WIDTH
_SHIFT = np.array(_WIDTH, np.uint8)


class Calibration:
    """Probabilities of use by target layer, distance, level and bin, rising with the bin.

    What a bin is worth depends on what else is known of the expert, which is its level. Probabilities begin at what the
    bins stand for. They follow the uses of all layers together first, and those of each layer as it gathers data of its
    own. What is known of all layers counts as `PRIOR` experts of a layer seen in each group of 8 bins, and so does at
    each distance what is known of the one before.

    Scores that say nothing, or the opposite of what happens, end up at the base rate: frequencies that fall where they
    should rise are averaged (isotonic regression; Barlow, Bartholomew, Bremner and Brunk, "Statistical inference under
    order restrictions", 1972).

    Args:
      layers: MoE layers, L.
      distances: distances that are predicted, H.
      half_life: observations of a layer and distance after which one counts half.

    Attributes:
      tables: float32 `[L, H, 8, 256]`, the probabilities.
    """

    PRIOR = 4.0

    def __init__(self, *, layers: int, distances: int, half_life: float = 512.0) -> None:
        self._forget = 0.5 ** (1 / half_life)
        self._seen = np.zeros((distances, 2, _GROUPS, LEVELS, layers))
        self._of_all = [NOMINAL.reshape(_GROUPS, 1, 1, -1).mean(axis=-1)] * (distances + 1)  # by distance from 0 on
        self._fresh = np.zeros((distances, layers, LEVELS * 2 * _GROUPS), np.int64)
        self._fresh_of = [list(of_distance) for of_distance in self._fresh]
        self.tables = np.empty((layers, distances, LEVELS, BINS), np.float32)
        self.tables[:] = NOMINAL

    def observe(self, layer: int, distance: int, bins: UInt8[np.ndarray, "E"], marks: UInt16[np.ndarray, "E"]) -> None:
        """Take note of a layer's uses, to be heeded from the next `learn` on.

        Args:
          layer: the layer that ran.
          distance: 1 to H.
          bins: what was predicted of its experts from that distance.
          marks: of its experts, `USED` and levels.
        """
        fresh = self._fresh_of[distance - 1][layer]
        fresh += np.bincount((bins >> _SHIFT) | marks, minlength=len(fresh))

    def learn(self, distance: int, observations: float) -> None:
        """Renew the tables of one distance.

        Args:
          distance: 1 to H.
          observations: of a layer at this distance since the last time.
        """
        seen, fresh = self._seen[distance - 1], self._fresh[distance - 1]
        seen *= self._forget**observations
        seen += fresh.reshape(-1, LEVELS, 2, _GROUPS).transpose(2, 3, 1, 0)
        fresh[:] = 0
        used, total = seen[1], seen[0] + seen[1]
        prior = self._of_all[distance - 1]
        for pooled in ((1, 2), (2,), ()):  # all levels and layers together, then by level, then by level and layer
            weight = total.sum(axis=pooled, keepdims=True) + self.PRIOR
            prior = isotonic((used.sum(axis=pooled, keepdims=True) + self.PRIOR * prior) / weight, weight)
            if pooled == (1, 2):
                self._of_all[distance] = prior
        groups = prior.transpose(2, 1, 0)
        self.tables[:, distance - 1] = groups[..., _BELOW] * (1 - _PART) + groups[..., _ABOVE] * _PART


def levels(probabilities: Float32[np.ndarray, "L E"], usual: float) -> UInt16[np.ndarray, "L E"]:
    """Eight levels of what is known of each expert, by its odds over those of an expert of its layer in general.

    The general probability is the layer's mean, but not below `usual`. On the bundled model, where paths are what is
    known and pre-gate scores are calibrated, four levels have 2 to 7 % more cross-entropy, and twelve at most 1 % less.
    """
    general = np.maximum(probabilities.mean(axis=1, keepdims=True), np.float32(usual))
    odds = general / np.maximum(1 - general, np.float32(1e-6))
    level = np.zeros(probabilities.shape, np.uint16)
    for ratio in _LEVEL_ODDS:
        least = odds * ratio
        level += probabilities > least / (1 + least)
    return level


def isotonic(
    values: Float64[np.ndarray, "G *columns"], weights: Float64[np.ndarray, "G *columns"]
) -> Float64[np.ndarray, "G *columns"]:
    """The rising column that is nearest to each column of `values` in weighted squares; weights are positive.

    In place i stands the greatest, over beginnings up to i, of the least mean of the stretches that reach i at least.
    """
    groups = len(values)
    sums, masses = (
        np.concatenate([np.zeros_like(each[:1]), each.cumsum(axis=0)]) for each in (values * weights, weights)
    )
    least = np.full_like(values, np.inf)
    rising = np.empty_like(values)
    for end in range(groups, 0, -1):
        means = (sums[end] - sums[:end]) / (masses[end] - masses[:end])
        np.minimum(least[:end], means, out=least[:end])
        rising[end - 1] = least[:end].max(axis=0)
    return rising


_MIDDLES = (np.arange(BINS) - (2**_WIDTH - 1) / 2) / 2**_WIDTH  # of bins, where those of groups are 0, 1, 2, ...
_BELOW = np.clip(np.floor(_MIDDLES), 0, _GROUPS - 1).astype(np.intp)
_ABOVE = np.clip(_BELOW + 1, 0, _GROUPS - 1)
_PART = np.clip(_MIDDLES - _BELOW, 0, 1)
