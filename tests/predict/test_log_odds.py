"""Choice scores as log-odds and bins, on numpy and on jax."""

import itertools
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.extra.numpy as extra
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax.predict.log_odds import BINS, LIMIT, NOMINAL, highest, log_odds, to_bins, union, union_bins

MODULES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])


def routed(choice: np.ndarray, top_k: int) -> np.ndarray:
    """What a router chooses, equal scores in the order of ids, as bool `[..., E]`."""
    ids = np.argsort(-choice, axis=-1, kind="stable")[..., :top_k]
    chosen = np.zeros(choice.shape, bool)
    np.put_along_axis(chosen, ids, True, axis=-1)
    return chosen


@hypothesis.given(
    choice=extra.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 9)),
        elements=st.floats(-100, 100, width=16) | st.sampled_from([0.0, 0.5, 1.0]),
    ),
    data=st.data(),
)
def test_positive_for_exactly_what_a_router_chooses(choice: np.ndarray, data: Any) -> None:
    top_k = data.draw(st.integers(1, choice.shape[-1]))
    odds = log_odds(choice, top_k, np)
    assert odds.dtype == np.float32
    assert (np.abs(odds) <= LIMIT).all()
    np.testing.assert_array_equal(odds > 0, routed(choice, top_k))
    np.testing.assert_array_equal(to_bins(odds, np) >= 128, odds > 0)
    falling = np.argsort(-choice, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(odds, falling, -1)) <= 1e-5).all()


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_jax_as_numpy(top_k: int) -> None:
    choice = np.random.default_rng(0).integers(-8, 8, (40, 16)).astype(np.float32)  # ties in every row
    ours = jax.jit(lambda choice: log_odds(choice, top_k, jnp))(choice)
    np.testing.assert_allclose(ours, log_odds(choice, top_k, np), atol=1e-4)
    ids = jax.lax.top_k(choice, top_k)[1]
    np.testing.assert_array_equal(np.sort(ids), np.nonzero(np.asarray(ours) > 0)[1].reshape(40, top_k))


@MODULES
def test_scale_and_offset_do_not_matter(xp: ModuleType) -> None:
    choice = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    odds = log_odds(xp.asarray(choice), 4, xp)
    np.testing.assert_allclose(log_odds(xp.asarray(7 * choice - 3), 4, xp), odds, atol=1e-4)
    np.testing.assert_allclose(log_odds(xp.asarray(choice.astype(np.float16)), 4, xp), odds, atol=0.02)


@MODULES
def test_what_is_not_finite_is_never_predicted(xp: ModuleType) -> None:
    choice = np.array([[3, np.nan, 1, -np.inf, 2, np.inf], [np.nan] * 6, [np.nan, 5, *[-np.inf] * 4]], np.float32)
    odds = np.asarray(log_odds(xp.asarray(choice), 2, xp))
    assert (odds[~np.isfinite(choice)] == -LIMIT).all()
    assert (odds[0] > 0).tolist() == [True, False, False, False, True, False]
    assert odds[2, 1] > 0
    assert to_bins(np.full(3, np.nan, np.float32), np).tolist() == [0, 0, 0]


@MODULES
def test_union_is_that_of_independent_choices(xp: ModuleType) -> None:
    odds = np.random.default_rng(0).uniform(-9, 9, (3, 2, 50)).astype(np.float32)
    chances = 1 / (1 + np.exp(-odds.astype(np.float64)))
    for active in itertools.product([False, True], repeat=3):
        mask = np.array(active)
        together = np.asarray(union(xp.asarray(odds), xp.asarray(mask), xp), np.float64)
        expected = 1 - np.prod(1 - chances[mask], axis=0)
        np.testing.assert_allclose(1 / (1 + np.exp(-together)), expected, rtol=1e-3, atol=2e-7)
        most = np.asarray(highest(xp.asarray(odds), xp.asarray(mask), xp))
        np.testing.assert_array_equal(most, odds[mask].max(axis=0, initial=-LIMIT))


@MODULES
def test_union_of_one_is_its_own_bins(xp: ModuleType) -> None:
    choice = np.random.default_rng(1).normal(size=(2, 7, 64)).astype(np.float32)
    odds = log_odds(xp.asarray(choice), 6, xp)
    alone = union(odds, xp.asarray(np.array([True, False])), xp)
    np.testing.assert_allclose(alone, odds[0], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(to_bins(alone, xp)) >= 128, routed(choice[0], 6))


@MODULES
def test_bins_stand_for_the_probabilities_in_them(xp: ModuleType) -> None:
    odds = np.linspace(-7.99, 7.99, 1000, dtype=np.float32)
    bins = np.asarray(to_bins(xp.asarray(odds), xp))
    assert bins.dtype == np.uint8
    middles = np.log(NOMINAL / (1 - NOMINAL.astype(np.float64)))
    assert np.abs(middles[bins] - odds).max() < 1 / 32 + 1e-2
    assert to_bins(np.array([-LIMIT, LIMIT], np.float32), np).tolist() == [0, 255]


def test_union_of_bins_is_that_of_what_they_stand_for() -> None:
    random = np.random.default_rng(0)
    of_each = random.integers(0, BINS, (16, 3, 400), dtype=np.uint8)
    for count in (2, 5, 16):
        middles = (of_each[:count].astype(np.float32) + 0.5 - 128) / 16
        together = union_bins(of_each[:count])
        assert (together.dtype, together.shape) == (np.uint8, (3, 400))
        expected = to_bins(union(middles, np.ones(count, bool), np), np).astype(int)
        assert np.abs(together - expected).max() <= 1  # by rounding, near the edge of a bin
        assert (together >= of_each[:count].max(axis=0)).all()
    rare = np.zeros((16, 1), np.uint8)
    assert union_bins(rare).tolist() == [int(np.log(16) * 16 + 0.5)]


def test_union_of_one_sequences_bins_is_itself() -> None:
    every = np.arange(BINS, dtype=np.uint8)
    np.testing.assert_array_equal(union_bins(every[None]), every)
    np.testing.assert_array_equal(union_bins(np.stack([every, np.zeros_like(every)]))[80:], every[80:])
