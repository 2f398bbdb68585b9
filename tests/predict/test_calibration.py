"""Calibration: isotonic regression against its definition, and tables against made-up frequencies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.predict.calibration import LEVEL_SHIFT, LEVELS, USED, Calibration, isotonic
from ef_jax.predict.log_odds import NOMINAL, to_bins


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 100)), min_size=1, max_size=12))
def test_isotonic_is_the_nearest_rising_column(column):
    values, weights = np.array(column).T[:, :, None]
    rising = isotonic(values, weights)
    assert (np.diff(rising, axis=0) >= -1e-12).all()
    # What is nearest in a convex cone: the rest is at right angles to it and makes no acute angle with its edges.
    rest = (values - rising) * weights
    assert abs((rest * rising).sum()) < 1e-9 * weights.sum()
    assert (rest[::-1].cumsum(axis=0) < 1e-9 * weights.sum()).all()


def test_columns_do_not_mix():
    random = np.random.default_rng(0)
    values, weights = random.random((2, 6, 3, 4))
    together = isotonic(values, weights)
    alone = isotonic(values[:, 1:2, 2], weights[:, 1:2, 2])
    np.testing.assert_allclose(together[:, 1, 2], alone[:, 0], rtol=1e-12)


def observe(calibration: Calibration, layer: int, log_odds: np.ndarray, used: np.ndarray, level: int = 0) -> None:
    marks = (used * USED | level << LEVEL_SHIFT).astype(np.uint16)
    calibration.observe(layer, 1, to_bins(log_odds, np), marks)


def test_tables_begin_nominal_and_rise():
    calibration = Calibration(layers=2, distances=3)
    assert (calibration.tables == NOMINAL).all()
    calibration.learn(2, 1)  # of nothing
    assert np.abs(calibration.tables - NOMINAL).max() < 0.02
    assert (np.diff(calibration.tables, axis=-1) >= 0).all()


def test_frequencies_are_found_by_layer_and_level():
    """Overconfident scores: true log-odds are half of what the bins stand for, and lower in layer 1 and level 0."""
    random = np.random.default_rng(0)
    calibration = Calibration(layers=2, distances=1)

    def true(x, layer, level):
        return 1 / (1 + np.exp(-(x / 2 - layer + level / 2)))

    for _ in range(300):
        for layer in range(2):
            for level in (0, 3):
                x = random.uniform(-4, 4, 64)
                observe(calibration, layer, x, random.random(64) < true(x, layer, level), level)
    calibration.learn(1, 300)
    x = np.linspace(-3, 3, 13)
    for layer in range(2):
        for level in (0, 3):
            learned = calibration.tables[layer, 0, level][to_bins(x, np)]
            np.testing.assert_allclose(learned, true(x, layer, level), atol=0.06)
    assert (np.diff(calibration.tables, axis=-1) >= 0).all()


def test_a_layer_without_data_follows_the_others():
    calibration = Calibration(layers=3, distances=1)
    x = np.full(32, 2.0)
    for _ in range(50):
        for layer in range(2):
            observe(calibration, layer, x, np.arange(32) < 8)
    calibration.learn(1, 1)
    at = to_bins(x[:1], np)[0]
    assert calibration.tables[2, 0, :, at] == pytest.approx([0.25] * LEVELS, abs=0.03)


def test_a_distance_without_data_follows_the_one_before():
    calibration = Calibration(layers=1, distances=2)
    x = np.full(32, 2.0)
    for _ in range(50):
        observe(calibration, 0, x, np.arange(32) < 8)
    for distance in (1, 2):
        calibration.learn(distance, 1)
    at = to_bins(x[:1], np)[0]
    assert calibration.tables[0, 1, :, at] == pytest.approx([0.25] * LEVELS, abs=0.03)


def test_what_is_long_ago_counts_less():
    calibration = Calibration(layers=1, distances=1, half_life=10)
    x = np.full(32, 1.1)
    for used in (True, False):
        for _ in range(40):
            observe(calibration, 0, x, np.full(32, used))
            calibration.learn(1, 1)
    assert 0.03 < calibration.tables[0, 0, 0, to_bins(x, np)[0]] < 0.12  # a half four times over
