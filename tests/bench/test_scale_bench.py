"""The simulation of many devices: its parts add up, and more slots never wait longer."""

import json
import sys
from pathlib import Path

import pytest

from bench import scale
from tests.replay.traces import made_up


def test_rows_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.npz"
    made_up(sequences=24, length=scale.TOKENS, layers=2, experts=16).save(trace)
    words = ["scale", str(trace), "--fit", "8", "--sequences", "1", "--slots", "1", "4", "--save", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", [*words, "--plot", str(tmp_path / "s.png")])
    assert scale.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = found["rows"]
    assert [(row["slots"], row["group"]) for row in rows[::3]] == [(1, 8), (1, 16), (4, 8), (4, 16)]
    for row in rows:
        assert row["step_ms"] == pytest.approx(row["stall_ms"] + row["exchange_ms"] + row["compute_ms"], rel=1e-4)
        assert (row["share"] == 1) == (row["stall_ms"] == 0)
        assert row["copies"] == 16 // row["group"]
        # One of those that wait for one another is never faster than the slowest of those that do not.
        assert row["step_ms"] <= row["slowest_copy_ms"] * 1.0001 <= row["together_ms"] * 1.0002
    for few, many in zip(rows[:6], rows[6:], strict=True):
        assert many["stall_ms"] < few["stall_ms"]
    assert (tmp_path / "s.png").stat().st_size > 0
