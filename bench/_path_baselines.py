"""Cheaper predictors of a token's path, which a trained one must beat: probabilities by token, layer and expert."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ef_jax.predict import History
from ef_jax.predict.log_odds import to_bins
from ef_jax.replay.trace import RoutingTrace

_PRIOR = 2.0  # tokens' worth of the layer's frequencies in a token's row of the table
_LEAST = 1e-4

Baseline = Callable[[Sequence[RoutingTrace], RoutingTrace], np.ndarray]


def token_table(learned: Sequence[RoutingTrace], asked: RoutingTrace) -> np.ndarray:
    """P(expert | token id) by counts in `learned`, backed off to the layer's frequencies: float32 `[N, L, E]`."""
    frequencies = frequency(learned, asked)
    ids, places = np.unique(asked.tokens, return_inverse=True)
    sums = np.zeros((len(ids), *frequencies.shape), np.float32)
    counts = np.zeros(len(ids), np.float32)
    for trace in learned:
        at = np.searchsorted(ids, trace.tokens)
        rows = np.flatnonzero(ids[np.minimum(at, len(ids) - 1)] == trace.tokens)
        np.add.at(counts, at[rows], 1)
        for layer, rank in itertools.product(range(trace.layers), range(trace.top_k)):
            np.add.at(sums, (at[rows], layer, trace.experts[rows, layer, rank].astype(np.intp)), 1)
    table = (sums + _PRIOR * frequencies) / (counts + _PRIOR)[:, None, None]
    return np.asarray(table[places], np.float32)


def previous_token(learned: Sequence[RoutingTrace], asked: RoutingTrace) -> np.ndarray:
    """What the token before used, most likely, then the layer's frequencies: float32 `[N, L, E]`."""
    frequencies = frequency(learned, asked)
    again = float(np.mean([_repeats(trace) for trace in learned]))
    scores = np.broadcast_to(frequencies * (1 - again), (asked.count, *frequencies.shape)).copy()
    follows = np.setdiff1d(np.arange(asked.count), asked.offsets[:-1])
    before = asked.experts[follows - 1].astype(np.intp)
    part = scores[follows]
    np.put_along_axis(part, before, np.take_along_axis(part, before, axis=2) + again, axis=2)
    scores[follows] = part
    return scores


def history(learned: Sequence[RoutingTrace], asked: RoutingTrace) -> np.ndarray:
    """`ef_jax.predict.History`, going along with the sequences: float32 `[N, L, E]`; `learned` is not looked at."""
    predictor = History(layers=asked.layers, experts=asked.num_experts)
    scores = np.zeros((asked.count, asked.layers, asked.num_experts), np.float32)
    for row, (token, routes) in enumerate(zip(asked.tokens.tolist(), asked.experts, strict=True)):
        predictor.on_step([token])
        scores[row] = predictor.step_scores()
        for layer, ids in enumerate(routes.tolist()):
            predictor.on_route(layer, [ids])
    return scores


BASELINES: dict[str, Baseline] = {
    "token-id table": token_table,
    "previous token": previous_token,
    "history": history,
}


def bins_of(probabilities: np.ndarray) -> np.ndarray:
    """uint8 bins of probabilities."""
    sure = np.clip(probabilities, _LEAST, 1 - _LEAST)
    return to_bins(np.log(sure) - np.log1p(-sure), np)


def frequency(learned: Sequence[RoutingTrace], asked: RoutingTrace) -> np.ndarray:
    """How often a token uses each expert of each layer: float32 `[L, E]`."""
    keys = np.arange(asked.layers)[:, None] * asked.num_experts
    uses = np.zeros(asked.layers * asked.num_experts)
    for trace in learned:
        uses += np.bincount((trace.experts + keys).ravel(), minlength=len(uses))
    share = uses.reshape(asked.layers, asked.num_experts) / sum(trace.count for trace in learned)
    return np.asarray(share, np.float32)


def _repeats(trace: RoutingTrace) -> float:
    """Of what a token uses, the share that the token before used."""
    follows = np.setdiff1d(np.arange(trace.count), trace.offsets[:-1])
    same = trace.experts[follows][..., None] == trace.experts[follows - 1][..., None, :]
    return float(same.any(axis=-1).mean())
