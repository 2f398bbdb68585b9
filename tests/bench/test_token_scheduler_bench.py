"""The bench of the token scheduler, on a small made-up trace."""

import json
import sys

import numpy as np
import pytest

from bench import _groupings, token_scheduler
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

    bins = np.random.default_rng(0).integers(0, 256, (160, 3, 16), np.uint8)
    np.save(tmp_path / "p.npy", bins)
    counted, told = token_scheduler.with_paths(trace, None, tmp_path / "p.npy")
    assert counted.sequences == 2
    np.testing.assert_array_equal(told, bins[120:])
    np.save(tmp_path / "p.npy", bins[:80])
    with pytest.raises(token_scheduler.InputError, match=r"uint8 of shape \(160, 3, 16\) is needed"):
        run(monkeypatch, tmp_path / "t.npz", "--fit", 4, "--paths", tmp_path / "p.npy")


@pytest.mark.parametrize("name", sorted(_groupings.GROUPINGS))
def test_groupings_give_every_row_one_group(name):
    chances = np.random.default_rng(0).random((11, 3, 8)).astype(np.float32)
    groups = _groupings.GROUPINGS[name](chances, 4)
    assert sorted(row for group in groups for row in group) == list(range(11))
    assert [len(group) <= 4 for group in groups] == [True] * 3
