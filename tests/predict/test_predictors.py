"""The predictors against what they know, and what they say of it."""

import itertools

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.predict import History, Oracle, Predictor

STEPS = [[[[0, 1]], [[2, 3]]], [[[1, 2]], [[3, 0]]], [[[2, 3]], [[0, 1]]]]


def used(routes, experts: int = 4) -> np.ndarray:
    rows = np.zeros((len(routes), experts), bool)
    for row, layer in zip(rows, routes, strict=True):
        row[np.unique(np.concatenate(layer))] = True
    return rows


def test_the_oracle_tells_this_step_and_the_next():
    oracle = Oracle(STEPS, layers=2, experts=4)
    assert isinstance(oracle, Predictor)
    for now, following in zip(STEPS, [*STEPS[1:], None], strict=True):
        oracle.on_step([5])
        np.testing.assert_array_equal(oracle.step_scores(), used(now))
        np.testing.assert_array_equal(oracle.ahead(0, 1), used(now)[1:])
        np.testing.assert_array_equal(oracle.ahead(-1, 2), used(now))
        np.testing.assert_array_equal(oracle.ahead(1, 2), used(following) if following else np.zeros((2, 4)))


def test_the_oracle_tells_all_sequences_of_a_batch():
    oracle = Oracle([[[[0, 1], [1, 3]]]], layers=1, experts=4)
    oracle.on_step([1, 2])
    assert oracle.step_scores().tolist() == [[1, 1, 0, 1]]


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.9])
def test_a_bad_oracle_names_as_many_experts_and_is_right_as_often_as_asked(recall):
    random = np.random.default_rng(0)
    steps = [[[random.permutation(32)[:6].tolist()] for _ in range(4)] for _ in range(300)]
    oracle = Oracle(steps, layers=4, experts=32, recall=recall, seed=1)
    right = 0
    for routes in steps:
        oracle.on_step([0])
        scores = oracle.step_scores()
        named = scores > 0
        if recall:
            assert named.sum(axis=1).tolist() == [6] * 4
            assert np.unique(scores).tolist() == [0, np.float32(recall)]
        right += (named & used(routes, 32)).sum()
    assert right / (300 * 4 * 6) == pytest.approx(recall, abs=0.02)


def test_an_oracles_recall_may_fall_with_distance():
    random = np.random.default_rng(0)
    steps = [[[random.permutation(32)[:6].tolist()] for _ in range(4)] for _ in range(300)]
    oracle = Oracle(steps, layers=4, experts=32, recall=[0.9, 0.5], seed=1)
    right = np.zeros(4)
    for routes in steps:
        oracle.on_step([0])
        truth, ahead = used(routes, 32), oracle.ahead(0, 3).copy()
        assert np.unique(ahead[0]).tolist() == [0, np.float32(0.9)]
        assert ((ahead > 0).sum(axis=1) == 6).all()
        right[1:] += ((ahead > 0) & truth[1:]).sum(axis=1)
        told_early, told_late = ahead[1] > 0, oracle.ahead(1, 1)[0] > 0
        assert not (told_early & truth[2] & ~told_late).any()
        assert oracle.step_scores()[2:].tolist() == oracle.ahead(-1, 4)[2:].tolist() == ahead[1:].tolist()
    assert right[1:] / (300 * 6) == pytest.approx([0.9, 0.5, 0.5], abs=0.04)


def test_a_bad_oracle_is_the_same_each_time_and_refuses_what_is_no_share():
    told = []
    for _ in range(2):
        oracle = Oracle(STEPS, layers=2, experts=4, recall=0.5, seed=3)
        oracle.on_step([0])
        told.append(oracle.step_scores().tolist())
    assert told[0] == told[1]
    with pytest.raises(InputError, match=r"recall 1.5: give a share from 0 to 1"):
        Oracle(STEPS, layers=2, experts=4, recall=1.5)
    with pytest.raises(InputError, match=r"recall -1.0: give a share from 0 to 1"):
        Oracle(STEPS, layers=2, experts=4, recall=[1.0, -1.0])
    with pytest.raises(InputError, match=r"recall has no figure"):
        Oracle(STEPS, layers=2, experts=4, recall=[])


def run(history: History, steps: np.ndarray) -> np.ndarray:
    """Scores before each of `steps`, bool `[N, L, E]`."""
    scores = []
    for step in steps:
        history.on_step([0])
        scores.append(history.step_scores().copy())
        for layer, row in enumerate(step):
            history.on_route(layer, [np.flatnonzero(row).tolist()])
    return np.array(scores)


def test_history_learns_frequencies_where_steps_are_independent():
    random = np.random.default_rng(0)
    share = np.array([0.1, 0.3, 0.6, 0.9])
    steps = random.random((4000, 2, 4)) < share
    history = History(layers=2, experts=4, half_life=500)
    scores = run(history, steps)[-1000:].mean(axis=(0, 1))
    np.testing.assert_allclose(scores, share, atol=0.05)


def test_history_learns_to_trust_the_step_before():
    """Each expert keeps its state with probability 0.9, else draws anew: the best forecast is known."""
    random = np.random.default_rng(0)
    steps = np.zeros((3000, 1, 8), bool)
    for before, now in itertools.pairwise(steps):
        now[:] = np.where(random.random((1, 8)) < 0.9, before, random.random((1, 8)) < 0.4)
    scores = run(History(layers=1, experts=8, half_life=300), steps)
    best = 0.9 * steps[:-1] + 0.1 * 0.4
    plain = np.full_like(best, steps.mean())
    error = ((scores[1000:] - steps[1000:]) ** 2).mean()
    assert error < 1.05 * ((best[999:] - steps[1000:]) ** 2).mean()
    assert error < 0.5 * ((plain[999:] - steps[1000:]) ** 2).mean()
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_history_looks_past_the_last_layer_into_the_next_step():
    history = History(layers=2, experts=4)
    for _ in range(20):
        history.on_step([0])
        history.on_route(0, [[0, 1], [1, 2]])
        history.on_route(1, [[3]])
    assert history.ahead(0, 1).tolist() == history.step_scores()[1:].tolist()
    np.testing.assert_allclose(history.ahead(1, 2), [[1, 1, 1, 0], [0, 0, 0, 1]], atol=0.1)
