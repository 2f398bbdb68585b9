"""The prediction cache: what counts as the same features, and what is kept."""

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.predict import History, PredictionCache, Predictor


class Counting(History):
    """Counts what it is asked; each answer is another."""

    def __init__(self) -> None:
        super().__init__(layers=4, experts=8)
        self.asked = 0

    def ahead(self, layer, horizon):
        self.asked += 1
        return np.full((horizon, 8), self.asked, np.float32)


def ask(cache: PredictionCache, *, tokens=(1,), layer=0, rows=((2, 3),), horizon=2) -> float:
    cache.on_step(list(tokens))
    cache.on_route(layer, [list(row) for row in rows])
    answer = cache.ahead(layer, horizon)
    assert answer.shape == (horizon, 8)
    return float(answer[0, 0])


def test_the_same_features_are_asked_about_once():
    cache = PredictionCache(Counting())
    assert isinstance(cache, Predictor)
    assert ask(cache) == ask(cache) == ask(cache, rows=[(3, 2)]) == 1
    assert ask(cache, horizon=1) == 1
    assert (cache.hits, cache.misses) == (3, 1)


@pytest.mark.parametrize("other", [{"tokens": (2,)}, {"layer": 1}, {"rows": [(2, 4)]}, {"horizon": 3}])
def test_other_features_are_asked_about(other):
    cache = PredictionCache(Counting())
    ask(cache)
    assert ask(cache, **other) == 2
    assert cache.hits == 0


def test_rows_keep_their_order_in_a_batch():
    cache = PredictionCache(Counting())
    assert ask(cache, tokens=(1, 2), rows=[(2, 3), (4, 5)]) == 1
    assert ask(cache, tokens=(1, 2), rows=[(4, 5), (2, 3)]) == 2


def test_what_was_asked_least_recently_is_forgotten():
    cache = PredictionCache(Counting(), entries=2)
    for token in (1, 2, 1, 3):
        ask(cache, tokens=(token,))
    assert cache.misses == 3
    assert ask(cache, tokens=(1,)) == 1
    assert ask(cache, tokens=(2,)) == 4
    with pytest.raises(InputError, match="0 entries"):
        PredictionCache(Counting(), entries=0)


def test_an_answer_outlives_the_view_it_was():
    inner = History(layers=2, experts=4)
    cache = PredictionCache(inner)
    for _ in range(3):
        cache.on_step([1])
        cache.on_route(0, [[0, 1]])
        cache.on_route(1, [[2, 3]])
    first = cache.ahead(1, 1).copy()
    for _ in range(5):
        inner.on_step([1])
        inner.on_route(0, [[2, 3]])
    np.testing.assert_array_equal(cache.ahead(1, 1), first)
