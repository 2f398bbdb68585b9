"""How good predicted paths are: recall and precision of candidates, of tokens and of batches, and calibration."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from ef_jax.predict.log_odds import BINS, NOMINAL
from ef_jax.replay.trace import RoutingTrace

_BINS_A_GROUP = 16
_ROWS = 2048


class Candidates(NamedTuple):
    """Of `number` candidates a layer and token: recall and precision by layer.

    Recall is the share of the experts used that are candidates, precision the share of the candidates that are used.
    """

    number: int
    recall: Float64[np.ndarray, " L"]
    precision: Float64[np.ndarray, " L"]


class Reliability(NamedTuple):
    """Calibration by groups of bins of one unit of log-odds.

    Attributes:
      predicted: mean probability that the bins of each group stand for; NaN where there are none.
      used: share that was used; likewise.
      predictions: how many in each group.
      error: expected calibration error: the mean distance of the two, weighted by `predictions`.
    """

    predicted: Float64[np.ndarray, " G"]
    used: Float64[np.ndarray, " G"]
    predictions: Int64[np.ndarray, " G"]
    error: float


def candidate_counts(top_k: int) -> tuple[int, int, int]:
    """How many candidates the paper looks at: K, 1.5 K rounded up, and 2 K."""
    return top_k, math.ceil(1.5 * top_k), 2 * top_k


def candidates(
    scores: Float32[np.ndarray, "N L E"] | UInt8[np.ndarray, "N L E"], trace: RoutingTrace, *, batch: int = 1
) -> list[Candidates]:
    """Recall and precision at K, 1.5 K and 2 K candidates; of a batch, those of the unions.

    A batch's candidates are the union of its tokens' candidates, and what it uses the union of what they use: the
    metrics of ExpertFlow-H (arXiv 2410.17954). Recall and precision are of the sums over all batches.

    Args:
      scores: of each token, higher is likelier; of equal ones the lower id comes first.
      trace: what was used.
      batch: tokens taken together, of as many sequences: those that run in one step of `trace.order(batch)`. What
        runs in narrower steps is left out.
    """
    top_k, experts = trace.top_k, trace.num_experts
    rows, bounds, _ = trace.order(batch)
    full = np.flatnonzero(np.diff(bounds) == batch)
    counts = candidate_counts(top_k)
    shape = (len(counts), trace.layers)
    hits, used_sum, found_sum = np.zeros(shape), np.zeros(trace.layers), np.zeros(shape)
    for first in range(0, len(full), max(1, _ROWS // batch)):
        part = full[first : first + max(1, _ROWS // batch)]
        index = rows[bounds[part][:, None] + np.arange(batch)]
        used = _union(trace.experts[index], experts)
        order = np.argsort(-scores[index].astype(np.float32), axis=-1, kind="stable")
        used_sum += used.sum(axis=(0, 2))
        for place, count in enumerate(counts):
            chosen = _union(order[..., :count], experts)
            hits[place] += (chosen & used).sum(axis=(0, 2))
            found_sum[place] += chosen.sum(axis=(0, 2))
    return [
        Candidates(count, hits[place] / used_sum, hits[place] / found_sum[place]) for place, count in enumerate(counts)
    ]


def reliability(bins: UInt8[np.ndarray, "N L E"], trace: RoutingTrace) -> Reliability:
    """How far the probabilities that bins stand for are those with which the experts are used."""
    seen = np.zeros((2, BINS), np.int64)
    for first in range(0, trace.count, _ROWS):
        part = bins[first : first + _ROWS]
        uses = np.take_along_axis(part, trace.experts[first : first + _ROWS].astype(np.intp), axis=2)
        seen[0] += np.bincount(part.ravel(), minlength=BINS)
        seen[1] += np.bincount(uses.ravel(), minlength=BINS)
    total, used = seen.reshape(2, -1, _BINS_A_GROUP).sum(axis=2)
    with np.errstate(invalid="ignore"):
        predicted = (seen[0] * NOMINAL.astype(np.float64)).reshape(-1, _BINS_A_GROUP).sum(axis=1) / total
        share = used / total
    error = float(np.nansum(np.abs(predicted - share) * total) / total.sum())
    return Reliability(predicted, share, total, error)


def _union(ids: np.ndarray, experts: int) -> np.ndarray:
    """Which experts any token of each batch has: bool `[S, L, E]` of ids `[S, B, L, n]`."""
    found = np.zeros((*ids.shape[:3], experts), bool)
    np.put_along_axis(found, ids.astype(np.intp), True, axis=3)
    return np.logical_or.reduce(found, axis=1)
