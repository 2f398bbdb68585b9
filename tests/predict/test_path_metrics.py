"""Recall and precision by hand, of tokens and of batches, and calibration."""

import dataclasses

import numpy as np

from ef_jax.predict.log_odds import BINS, NOMINAL
from ef_jax.predict.path_metrics import candidate_counts, candidates, reliability
from ef_jax.replay.trace import RoutingTrace
from tests.predict.learnable import learnable


def tiny(experts: list[list[int]], offsets: list[int]) -> RoutingTrace:
    """One layer of 6 experts."""
    trace = learnable(sequences=1, length=len(experts), layers=1, experts=6, distances=1)
    ids = np.array(experts, np.uint8)[:, None]
    return dataclasses.replace(trace, experts=ids, offsets=np.array(offsets), pregate=None)


def test_recall_and_precision_by_hand() -> None:
    trace = tiny([[0, 1], [2, 3], [1, 0], [4, 5]], [0, 2, 4])
    scores = np.zeros((4, 1, 6), np.uint8)
    for row, order in enumerate(([0, 2, 1, 3, 4, 5], [2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0], [4, 0, 1, 5, 2, 3])):
        scores[row, 0, order] = [60, 50, 40, 30, 20, 10]
    # Found among the first 2: 1, 2, 0, 1 of 2; among the first 3: 2, 2, 0, 1; among the first 4: 2, 2, 0, 2.
    one = candidates(scores, trace)
    assert [part.number for part in one] == [2, 3, 4] == list(candidate_counts(2))
    np.testing.assert_allclose([part.recall[0] for part in one], [4 / 8, 5 / 8, 6 / 8])
    np.testing.assert_allclose([part.precision[0] for part in one], [4 / 8, 5 / 12, 6 / 16])
    # Steps of two: tokens 0 and 2 use {0, 1}, candidates {0, 2, 4, 5}; tokens 1 and 3 use {2, 3, 4, 5},
    # candidates {0, 2, 3, 4}.
    both = candidates(scores, trace, batch=2)[0]
    np.testing.assert_allclose([both.recall[0], both.precision[0]], [(1 + 3) / (2 + 4), (1 + 3) / (4 + 4)])


def test_steps_narrower_than_the_batch_are_left_out() -> None:
    trace = tiny([[0, 1], [2, 3], [4, 5]], [0, 2, 3])
    scores = np.zeros((3, 1, 6), np.uint8)
    scores[1, 0, [0, 1]] = 9  # runs alone, and would be all wrong
    scores[0, 0, [0, 1]] = scores[2, 0, [4, 5]] = 9
    assert candidates(scores, trace, batch=2)[0].recall[0] == 1


def test_reliability_tells_calibrated_bins_from_others() -> None:
    random = np.random.default_rng(0)
    trace = learnable(sequences=8, length=256, layers=1, experts=8, vocab=2, distances=1)
    ids = np.argsort(random.random((trace.count, 8)))[:, None, :2].astype(np.uint8)
    trace = dataclasses.replace(trace, experts=ids, pregate=None)
    honest = np.full((trace.count, 1, 8), int(np.searchsorted(NOMINAL, 0.25)), np.uint8)
    told = reliability(honest, trace)
    assert told.error < 0.02
    assert told.predictions.sum() == trace.count * 8
    group = int(honest[0, 0, 0]) * len(told.used) // BINS
    assert abs(told.used[group] - 0.25) < 1e-9
    assert np.isnan(told.used).sum() == len(told.used) - 1
    sure = reliability(np.full_like(honest, 200), trace)
    assert abs(sure.error - (NOMINAL[200] - 0.25)) < 1e-6
