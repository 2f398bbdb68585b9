"""The bench of the token scheduler, on a small made-up trace."""

import json
import sys

import numpy as np
import pytest

from bench import _groupings, token_scheduler
from bench._token_table import table_bins
from ef_jax.predict.log_odds import NOMINAL
from tests.replay.traces import made_up


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["token_scheduler", *map(str, words)])
    return token_scheduler.main()


def test_parts(tmp_path, monkeypatch, capsys):
    trace = made_up(sequences=8, length=20)
    trace.save(tmp_path / "t.npz")
    monkeypatch.setattr(token_scheduler, "SIZES", ((8, 4),))
    assert run(monkeypatch, tmp_path / "t.npz", "--fit", 4, "--draws", 2) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [cell["rows"] for cell in result["unions"]["cells"]] == [8]
    for cell in result["optimum"]["cells"]:
        assert cell["true"]["best"] <= cell["true"]["regroup"] <= 1.03 * cell["true"]["best"]
    assert result["cost"]["shape"] == [64, 48, 128]

    np.save(tmp_path / "p.npy", np.zeros((80, 3, 15), np.uint8))
    with pytest.raises(token_scheduler.InputError, match=r"uint8 of shape \(80, 3, 16\) is needed"):
        run(monkeypatch, tmp_path / "t.npz", "--fit", 4, "--paths", tmp_path / "p.npy")


@pytest.mark.parametrize("name", sorted(_groupings.GROUPINGS))
def test_groupings_give_every_row_one_group(name):
    chances = np.random.default_rng(0).random((11, 3, 8)).astype(np.float32)
    groups = _groupings.GROUPINGS[name](chances, 4)
    assert sorted(row for group in groups for row in group) == list(range(11))
    assert [len(group) <= 4 for group in groups] == [True] * 3


def test_a_table_tells_tokens_by_their_ids():
    trace = made_up(sequences=4, length=50)
    known, told = trace.select(0, 3), trace.select(3)
    chances = NOMINAL[table_bins(known, told)]
    assert chances.sum(axis=-1).mean() == pytest.approx(trace.top_k, rel=0.05)
    for token in np.intersect1d(known.tokens, told.tokens)[:5]:
        uses = np.zeros((trace.layers, trace.num_experts))
        rows = np.flatnonzero(known.tokens == token)
        for layer in range(trace.layers):
            uses[layer] = np.bincount(known.experts[rows, layer].ravel(), minlength=trace.num_experts)
        found = chances[np.flatnonzero(told.tokens == token)[0]]
        assert (found[uses > 0].min() > found[uses == 0]).all() or len(rows) > 1
    unknown = np.flatnonzero(~np.isin(told.tokens, known.tokens))
    assert len(unknown)
    assert (chances[unknown] == chances[unknown[0]]).all()
