"""The replays of `bench.routing_path` on a small made-up trace."""

import numpy as np
import pytest

from bench import _routing_path_cache as cache
from tests.replay.traces import made_up

TRACE = made_up(sequences=6, length=20, layers=3, experts=16, top_k=2, pregate=2)


def knowing(trace) -> np.ndarray:
    """Bins that name what each token uses."""
    paths = np.zeros((trace.count, trace.layers, trace.num_experts), np.uint8)
    np.put_along_axis(paths, trace.experts.astype(np.intp), 255, axis=2)
    return paths


def test_arms_and_figures(capsys) -> None:
    result = cache.measure(cache._Data(TRACE, knowing(TRACE)), {1: 6, 2: 6}, (0.25,))
    rows = {(row["batch"], row["arm"]): row for row in result["rows"]}
    arms = {"lru", "lfu", "next_use", "belady", "plec + path", "path", "pregate", "fusion", "fusion, unbounded"}
    assert set(rows) == {(batch, arm) for batch in (1, 2) for arm in arms}
    for batch in (1, 2):
        of = {arm: rows[batch, arm] for arm in arms}
        assert of["lru"]["points_over_lru"] == 0
        assert of["lru"]["hits"] < of["belady"]["hits"] < of["fusion"]["hits"]
        assert of["path"]["hits"] > 0.85
        assert of["fusion"]["stall"] < of["lru"]["stall"]
        assert of["lru"]["wasted"] == 0
    assert "over a balanced link" in capsys.readouterr().out


def test_a_balanced_link_carries_what_a_full_batch_uses() -> None:
    assert cache.distinct(TRACE, 1) == 2
    assert 3 < cache.distinct(TRACE, 2) < 4
    assert cache.distinct(TRACE.select(0, 1), 2) == pytest.approx(2)  # no step is full
