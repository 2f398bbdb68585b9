"""Groups of rows with small unions of experts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench._groupings import partitions, union
from ef_jax.errors import InputError
from ef_jax.predict.log_odds import NOMINAL
from ef_jax.schedule.token_scheduler import in_order, regroup

_MOST = 0.98  # what `regroup` takes for certain


def routes(random, rows, layers, experts, top_k, kinds):
    """One-hot routes of rows of several kinds, each with favourite experts of its own."""
    favourites = random.normal(size=(kinds, layers, experts))
    scores = favourites[random.integers(kinds, size=rows)] + 0.7 * random.normal(size=(rows, layers, experts))
    chosen = np.argsort(-scores, axis=-1)[..., :top_k]
    paths = np.zeros((rows, layers, experts), np.float32)
    np.put_along_axis(paths, chosen, 1.0, axis=-1)
    return paths


@given(
    rows=st.integers(0, 12),
    size=st.integers(1, 6),
    layers=st.integers(1, 3),
    experts=st.integers(1, 6),
    seed=st.integers(0, 1000),
    as_bins=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_one_group_and_the_union_no_larger_than_in_order(rows, size, layers, experts, seed, as_bins):
    random = np.random.default_rng(seed)
    if as_bins:
        paths = random.integers(0, 256, (rows, layers, experts), np.uint8)
        chances = np.minimum(NOMINAL[paths], _MOST)
    else:
        paths = random.random((rows, layers, experts)).round(1)
        chances = np.minimum(paths, _MOST)
    before = paths.copy()
    groups = regroup(paths, size)
    np.testing.assert_array_equal(paths, before)
    assert sorted(itertools.chain(*groups)) == list(range(rows))
    assert len(groups) == -(-rows // size)
    assert all(len(group) <= size and group == sorted(group) for group in groups)
    assert groups == sorted(groups)
    assert union(chances, groups) <= union(chances, in_order(rows, size)) + 1e-3
    assert regroup(paths, size) == groups


@pytest.mark.parametrize(("rows", "size"), [(6, 3), (8, 4), (10, 5), (9, 3), (7, 3)])
def test_unions_are_near_the_smallest_there_are(rows, size):
    found, best, given_order = 0.0, 0.0, 0.0
    for seed in range(8):
        paths = routes(np.random.default_rng(seed), rows, layers=3, experts=8, top_k=2, kinds=3)
        found += union(paths, regroup(paths, size))
        best += min(union(paths, groups) for groups in partitions(list(range(rows)), size))
        given_order += union(paths, in_order(rows, size))
    assert best <= found <= 1.02 * best
    assert found < given_order


def test_rows_of_two_kinds_are_told_apart():
    paths = np.zeros((8, 2, 8), np.float32)
    paths[::2, :, :4], paths[1::2, :, 4:] = 1.0, 1.0
    assert regroup(paths, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_row_may_move_to_a_group_that_is_not_full():
    paths = np.zeros((5, 1, 8), np.float32)
    for row, expert in enumerate((0, 1, 0, 1, 1)):
        paths[row, 0, expert] = 1.0
    assert regroup(paths, 3) == [[0, 2], [1, 3, 4]]


def test_many_layers_are_told_apart_by_some_of_them():
    paths = routes(np.random.default_rng(0), rows=32, layers=24, experts=96, top_k=6, kinds=2)
    assert union(paths, regroup(paths, 16)) < 0.9 * union(paths, in_order(32, 16))


def test_more_rows_than_are_told_apart_at_a_time():
    paths = routes(np.random.default_rng(1), rows=150, layers=4, experts=16, top_k=2, kinds=3)
    groups = regroup(paths, 12)
    assert sorted(itertools.chain(*groups)) == list(range(150))
    assert [len(group) for group in groups].count(12) >= 10
    assert len(groups) == 13
    assert groups[:5] == regroup(paths[:60], 12)
    assert union(paths, groups) < 0.9 * union(paths, in_order(150, 12))


def test_bins_and_the_probabilities_that_they_stand_for_are_one():
    bins = np.random.default_rng(3).integers(60, 200, (12, 4, 16), np.uint8)
    assert regroup(bins, 4) == regroup(NOMINAL[bins], 4)


@pytest.mark.parametrize(
    ("paths", "size", "words"),
    [
        (np.zeros((4, 2, 8), np.uint8), 0, "groups of 0 rows"),
        (np.full((4, 2, 8), 1.5), 2, "paths hold 1.5 to 1.5"),
        (np.full((4, 2, 8), np.nan), 2, "paths hold nan"),
        (np.full((4, 2, 8), -0.1), 2, "paths hold -0.1"),
    ],
)
def test_bad_input(paths, size, words):
    with pytest.raises(InputError, match=words):
        regroup(paths, size)
