"""The benches of forecasts: recorded runs are met, runs are made, and the table of released models is complete."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _report, forecast, forecast_table
from ef_jax.forecast import MACHINES


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The JSON of a bench's last line; what stands above it is printed again."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert bench.main() == 0
    *table, line = capsys.readouterr().out.splitlines()
    print("\n".join(table))
    return json.loads(line)


def test_recorded_runs_are_met(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(forecast, monkeypatch, capsys, "--only", "recorded")["recorded"]
    assert len([row for row in found["runs"] if not row["calibrates"]]) == found["rows"] >= 15
    assert found["within_aim"] >= found["rows"] - 1
    assert 0.9 <= found["median"] <= 1.1
    for row in found["runs"]:
        assert row["low"] < row["forecast"] < row["high"]
        if row["calibrates"]:
            assert row["ratio"] == pytest.approx(1, abs=0.1)


def test_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--only", "runs", "--machine", "cpu-emulated-pcie3", "--models", "synthetic", "--repeats", "1"]
    shape = ["--shape", "D=64,F=32,E=8,K=2,L=2,V=64", "--tokens", "8", "--batches", "2", "--fractions", "0.25"]
    found = run(forecast, monkeypatch, capsys, *words, *shape, "--scratch", str(tmp_path))["runs"]
    assert not list(tmp_path.iterdir())
    rows = {row["run"]: row for row in found["rows"]}
    assert list(rows) == [f"synthetic, {link}, 25 %" for link in ("PCIe 3.0", "PCIe 4.0", "no bound")]
    for row in rows.values():
        assert row["measured"] > 0
        # The replay of a run's own routing, by which forecasts go, makes the run's own hits.
        assert row["hits_forecast"][1] == pytest.approx(row["hits"], abs=0.05)
        assert row["ratio_by_trace"] == pytest.approx(row["forecast_by_trace"] / row["measured"], rel=1e-4)


def test_the_saved_table_is_what_forecasts_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(forecast_table, monkeypatch, capsys)
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 2 + len(forecast_table.MODELS)
    rows = found["rows"]
    assert len(rows) == 40
    assert {row["machine"] for row in rows} == set(forecast_table.MACHINE_NAMES) <= MACHINES.keys()
    saved = json.loads(_report.result_path("forecast_table").read_text())
    assert saved["rows"] == rows, "run python -m bench.forecast_table --save"
    assert saved["machines"] == found["machines"]
