"""Choice scores as log-odds of use, and log-odds as bins of one byte, which is what crosses from device to host.

Each function works on numpy and jax arrays: `xp` is `numpy` or `jax.numpy`.
"""

from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

LIMIT = 16.0
"""Log-odds stay within it on both sides: a probability of 1e-7 is as good as none."""

SLOPE = 2.0
"""Log-odds of a margin of one standard deviation. Where predicted and true scores are jointly normal with
correlation r, it is about 1.7 r / sqrt(1 - r^2): 2.0 belongs to r = 0.76. It is only where calibration begins."""

BINS = 256

_PER_UNIT, _ZERO = 16, 128

_LEAST = np.float32(1e-4)

_UNUSED = np.log1p(np.exp((np.arange(BINS) + 0.5 - _ZERO) / _PER_UNIT)).astype(np.float32)  # -log(1 - p) of a bin

NOMINAL = (1 / (1 + np.exp(-(np.arange(BINS) + 0.5 - _ZERO) / _PER_UNIT))).astype(np.float32)
"""float32 `[256]`, the probability that a bin stands for: that of its middle."""


def log_odds(choice: Float[Any, "*rows E"], top_k: int, xp: ModuleType) -> Float32[Any, "*rows E"]:
    """Log-odds that each expert is among the `top_k`: its margin over the middle between the k-th and the next score.

    The margin is in standard deviations of the row's scores, so that their scale and offset do not matter. It is
    positive for exactly the `top_k` best, equal scores in the order of ids, as routers choose.

    Args:
      choice: what a router takes its top-k of. What is not finite (an expert of a masked group, NaN) gets the lowest
        log-odds.
      top_k: K; with K = E all are in.
      xp: `numpy` or `jax.numpy`.

    Returns:
      Log-odds in `[-LIMIT, LIMIT]`.
    """
    experts = choice.shape[-1]
    finite = xp.isfinite(choice)
    known = xp.where(finite, choice, 0).astype(np.float32)
    mean, spread = _moments(known, finite, xp)
    scores = xp.where(finite, known, mean - experts * spread)  # no score is that far below the mean of its row
    kth, after, chosen = _ranked(scores, top_k, xp)
    after = kth - 2 * spread if after is None else after
    margin = SLOPE * (scores - (kth + after) / 2) / spread
    margin = xp.where(chosen, xp.maximum(margin, _LEAST), xp.minimum(margin, -_LEAST))
    return xp.clip(xp.where(finite, margin, -LIMIT), -LIMIT, LIMIT).astype(np.float32)


def union(log_odds: Float32[Any, "B *rows E"], active: Bool[Any, "B"], xp: ModuleType) -> Float32[Any, "*rows E"]:
    """Log-odds that any active sequence uses an expert, as if they chose independently.

    Args:
      log_odds: each sequence's, in `[-LIMIT, LIMIT]`.
      active: sequences that count. Without any, every expert gets the lowest log-odds.
      xp: `numpy` or `jax.numpy`.

    Returns:
      Log-odds in `[-LIMIT, LIMIT]`; of a single active sequence, its own up to rounding.
    """
    counts = active.reshape(-1, *(1,) * (log_odds.ndim - 1))
    # -log(1 - p) adds up over sequences; where p is small it is about exp(x), which float32 holds at any smallness.
    unused = xp.where(counts, xp.logaddexp(log_odds, np.float32(0)), 0).sum(axis=0)
    unused = xp.maximum(unused, np.float32(1e-12))
    return xp.clip(unused + xp.log(-xp.expm1(-unused)), -LIMIT, LIMIT).astype(np.float32)


def highest(log_odds: Float32[Any, "B *rows E"], active: Bool[Any, "B"], xp: ModuleType) -> Float32[Any, "*rows E"]:
    """The highest log-odds of each expert among active sequences: positive for exactly what any of them chooses.

    For distance 0, where nothing is uncertain and `union` would add up chances that do not exist.
    """
    counts = active.reshape(-1, *(1,) * (log_odds.ndim - 1))
    return xp.where(counts, log_odds, -LIMIT).max(axis=0).astype(np.float32)


def to_bins(log_odds: Float[Any, "*shape"], xp: ModuleType) -> UInt8[Any, "*shape"]:
    """Bins of log-odds: bin b holds those from `(b - 128) / 16` up to the next bin's, the outer ones all beyond.

    Bins from 128 on are those of positive log-odds. NaN becomes the lowest bin.
    """
    numbers = xp.where(xp.isnan(log_odds), -LIMIT, log_odds)
    return xp.clip(xp.floor(numbers * _PER_UNIT) + _ZERO, 0, BINS - 1).astype(np.uint8)


def union_bins(bins: UInt8[np.ndarray, "B *rows E"]) -> UInt8[np.ndarray, "*rows E"]:
    """Bins that any of the sequences uses an expert: `union` of what bins of each stand for, as bins again.

    The bins of one sequence come out as they are. In numpy alone: 0.1 ms for 16 sequences of 48 layers x 128 experts.

    Args:
      bins: each sequence's, of one at least.
    """
    if len(bins) == 1:
        return bins[0]
    unused = _UNUSED.take(bins, mode="clip").sum(axis=0)
    return to_bins(np.log(np.expm1(np.minimum(unused, np.float32(2 * LIMIT)))), np)


def _moments(known: Float32[Any, "*rows E"], finite: Bool[Any, "*rows E"], xp: ModuleType) -> tuple[Any, Any]:
    """Mean and standard deviation, float32 `[..., 1]`, of a row's finite scores; no deviation counts as 1."""
    count = xp.maximum(finite.sum(axis=-1, keepdims=True), 1).astype(np.float32)
    mean = known.sum(axis=-1, keepdims=True) / count
    deviation = xp.where(finite, known - mean, 0)
    spread = xp.sqrt((deviation * deviation).sum(axis=-1, keepdims=True) / count)
    return mean, xp.where(spread > 0, spread, 1).astype(np.float32)


def _ranked(scores: Float32[Any, "*rows E"], top_k: int, xp: ModuleType) -> tuple[Any, Any, Any]:
    """The k-th and the next score of each row, `[..., 1]`, None for no next; and which are the `top_k`, `[..., E]`."""
    experts = scores.shape[-1]
    if xp is np:
        ranked = np.sort(scores, axis=-1)
        lowest = ranked[..., experts - top_k, None]
        above, level = scores > lowest, scores == lowest
        left = top_k - above.sum(axis=-1, keepdims=True)
        chosen = above | (level & (np.cumsum(level, axis=-1) <= left))
        return lowest, ranked[..., experts - top_k - 1, None] if top_k < experts else None, chosen
    from jax import lax

    # Without the barrier XLA turns a top-k of which single columns are read into a sort, which takes a CPU 16 times as
    # long; one barrier for both, and jax 0.10's XLA fails on it where there are several devices. Equal scores come in
    # the order of ids.
    best, ids = (lax.optimization_barrier(part) for part in lax.top_k(scores, min(top_k + 1, experts)))
    kth, last = best[..., top_k - 1, None], ids[..., top_k - 1, None]
    after = best[..., top_k, None] if top_k < experts else None
    id = lax.broadcasted_iota(ids.dtype, scores.shape, scores.ndim - 1)
    return kth, after, (scores > kth) | ((scores == kth) & (id <= last))
