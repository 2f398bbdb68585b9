"""Recall as counted online against what a plain count over all distances gives."""

import numpy as np
import pytest

from ef_jax.predict import Accuracy
from ef_jax.predict.log_odds import log_odds, to_bins

L, E, K, H = 3, 16, 3, 2


def bins_of(scores: np.ndarray) -> np.ndarray:
    return to_bins(log_odds(scores.astype(np.float32), K, np), np)


def run(accuracy: Accuracy, steps: int, told, *, seed: int = 0) -> None:
    """Routers that choose by normal scores; `told(scores, layer, random)` is what a pre-gate sees of them."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        scores = random.standard_normal((L, E))
        accuracy.on_step()
        for layer in range(-1, L):
            ahead = np.zeros((H + 1, E), np.uint8)
            for distance in range(H + 1):
                if 0 <= layer + distance < L:
                    ahead[distance] = bins_of(told(scores[layer + distance], distance, random))
            accuracy.on_ahead(layer, ahead)
            if layer >= 0:
                accuracy.on_route(layer, [np.argsort(-scores[layer])[:K].tolist()])


def test_a_perfect_pre_gate_reads_one_at_every_distance():
    accuracy = Accuracy(layers=L, distances=H)
    run(accuracy, 30, lambda scores, distance, random: scores)
    report = accuracy.report()
    assert report["recall"] == [1.0] * (H + 1)
    assert report["recall_by_layer"] == [[1.0, 1.0, None], [1.0] * 3, [1.0] * 3]  # layer 0 is never two ahead


def test_random_scores_read_chance_but_for_the_own_ones():
    accuracy = Accuracy(layers=L, distances=H)
    run(accuracy, 1500, lambda scores, distance, random: random.standard_normal(E) if distance else scores)
    recall = accuracy.report()["recall"]
    assert recall[0] == 1.0
    assert recall[1:] == pytest.approx([K / E] * H, abs=0.03)
    assert accuracy.report()["previous_token"] == pytest.approx(K / E, abs=0.03)


def test_a_misaligned_layer_shows_at_distance_0():
    accuracy = Accuracy(layers=L, distances=H)
    run(accuracy, 300, lambda scores, distance, random: np.roll(scores, 1))
    assert accuracy.report()["recall"][0] < 0.5


def test_equal_scores_count_for_their_chance():
    accuracy = Accuracy(layers=1, distances=1)
    ahead = np.zeros((2, E), np.uint8)
    ahead[1, :4] = 200, 150, 150, 150  # two of the three equal ones are among the three best
    for _ in range(2):
        accuracy.on_step()
        accuracy.on_ahead(-1, ahead)
        accuracy.on_route(0, [[0, 1, 9]])
    assert accuracy.report()["recall"][1] == pytest.approx((1 + 2 / 3) / 3)


def test_a_batch_is_measured_by_the_experts_it_used():
    """Three distinct experts in all, of which two are among the three best."""
    accuracy = Accuracy(layers=1, distances=1)
    ahead = np.zeros((2, E), np.uint8)
    ahead[1, [0, 1, 5]] = 200
    for _ in range(2):
        accuracy.on_step()
        accuracy.on_ahead(-1, ahead)
        accuracy.on_route(0, [[0, 1], [1, 9]])
    report = accuracy.report()
    assert report["recall"] == [None, pytest.approx(2 / 3)]
    assert report["previous_token_by_layer"] == [1.0]


def test_nothing_seen_is_none():
    accuracy = Accuracy(layers=1, distances=2)
    accuracy.on_step()
    accuracy.on_route(0, [[1, 2]])
    assert accuracy.report() == {
        "recall": [None] * 3,
        "recall_by_layer": [[None] * 3],
        "previous_token": None,
        "previous_token_by_layer": [None],
    }
