"""What options on prefetching come to."""

from pathlib import Path

import pytest

import ef_jax
from ef_jax.loading import bundled_model
from ef_jax.prefetching import DISTANCES, settle
from ef_jax.weights import open_checkpoint


@pytest.fixture(scope="module")
def spec():
    with open_checkpoint(bundled_model()) as checkpoint:
        return checkpoint.spec


def test_defaults_prefetch_by_the_pregate_where_copies_overlap_and_say_why_not_elsewhere(spec):
    on, off = settle(spec, overlaps=True), settle(spec, overlaps=False)
    assert (on.prefetch, on.predictor, on.off_because, on.distances(spec)) == ("auto", "pregate", None, DISTANCES)
    assert (off.prefetch, off.predictor, off.distances(spec)) == ("off", "none", 0)
    assert "cores that compute" in off.off_because


def test_options_as_given(spec, tmp_path: Path):
    assert settle(spec, prefetch=3, overlaps=True).prefetch == settle(spec, prefetch="3", overlaps=True).prefetch == 3
    assert settle(spec, prefetch=0, overlaps=True).prefetch == "off"
    assert settle(spec, prefetch="off", predictor="pregate", overlaps=False).distances(spec) == DISTANCES
    assert settle(spec, prefetch="off", overlaps=True).off_because is None
    trained = settle(spec, predictor=tmp_path, overlaps=True)
    assert (trained.predictor, trained.trained) == ("pregate", tmp_path)
    history = settle(spec, predictor="history", overlaps=True)
    assert (history.predictor, history.distances(spec)) == ("history", 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"candidates": "best"}, "candidates 'best'"), ({"order": "first"}, "order 'first'")],
)
def test_rules_that_there_are_not_are_refused_even_where_nothing_is_prefetched(option, message):
    with pytest.raises(ef_jax.InputError, match=message):
        ef_jax.load(prefetch="off", **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": 9}, "horizon of 0 to 8"),
        ({"prefetch": -1}, "horizon of 0 to 8"),
        ({"prefetch": "often"}, "'often'"),
        ({"prefetch": 2, "overlaps": False}, "cannot take effect"),
        ({"prefetch": 2, "predictor": "none"}, "needs a predictor"),
        ({"predictor": "no/such/directory"}, "'no/such/directory'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(spec, options, message):
    with pytest.raises(ef_jax.InputError, match=message) as refused:
        settle(spec, **{"overlaps": True, **options})
    assert "\n" not in str(refused.value)
