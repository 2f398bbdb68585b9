"""The simulation of many devices: its parts add up, more slots wait less, and its page has what was saved."""

import json
import re
import sys
from pathlib import Path

import pytest

from bench import _report, _scale_page, _scale_prompts, scale
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


def test_the_page_has_the_saved_figures() -> None:
    found = json.loads(_report.result_path("scale").read_text())
    page = Path(scale.__file__).with_suffix(".md").read_text()
    tables = [part for part in page.split("\n\n") if part.startswith("|")]
    assert tables == list(_scale_page.tables(found).values()), "python -m bench._scale_page prints them"
    shown = set(re.findall(r"[\d.,]*\d", "\n".join(tables)))
    prose = re.sub(r"\n?\|.*", "", page)
    assert set(re.findall(r"([\d.,]*\d)\s(?:ms|tokens/s)", prose)) <= shown


def test_what_is_saved_follows_from_its_rows() -> None:
    found = json.loads(_report.result_path("scale").read_text())
    rows, settings = found["rows"], found["settings"]
    assert found["figures"]["machine"] == scale.MACHINE.as_dict()
    assert found["figures"]["layer_seconds"] == scale.LAYER_SECONDS
    machines = [scale._machine(rows, slots, count) for slots in settings["slots"] for count in scale.DEVICES]
    assert found["machines"] == machines
    figures = _scale_prompts.Figures(
        machine=scale.MACHINE, network=scale.NETWORK, far_network=scale.FAR_NETWORK, node=scale.NODE,
        layer_seconds=scale.LAYER_SECONDS, block_bytes=settings["block_bytes"], row_bytes=settings["row_bytes"],
        layers=26, num_experts=64, top_k=6,
    )  # fmt: skip
    balanced = (row for row in rows if row["placement"] == "balanced")
    prompts = [prompt for row in balanced for prompt in _scale_prompts.predict(row, figures)]
    for saved, ours in zip(found["prompts"], prompts, strict=True):
        assert saved == pytest.approx(ours, rel=1e-4)
