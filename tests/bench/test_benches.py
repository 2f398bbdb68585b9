"""The benches run, and their last line is what it says: strict JSON with where and how it was measured."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import _models, _report, _run, offload
from bench._host_work import COMPONENTS, HostWork
from bench._single_program import SingleProgram
from ef_jax.loading import load
from ef_jax.sampling_options import SamplingOptions


def _strict(line: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_offload_prints_a_table_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "results" / "offload.json"
    shape = "D=32,F=16,E=8,K=2,L=2,V=64"
    options = ["--prompts", "2", "--prompt-tokens", "5", "--tokens", "6", "--repeats", "1", "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["offload", "--shape", shape, *options, "--save", str(saved)])
    monkeypatch.setattr(offload, "SHARES", (0.25,))
    monkeypatch.setattr(offload, "_LINK_SECONDS", 1e-6)
    assert offload.main() == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = _strict(line)
    assert result == _strict(saved.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert result["tokens_equal"]
    assert str(tmp_path) not in line
    assert result["run"]["machine"]["cores"] >= 1
    assert {"python", "jax", "jaxlib", "flax", "numpy"} <= result["run"]["versions"].keys()

    rows = {(row["mode"], row["expert_fraction"]): row for row in result["rows"]}
    assert len(table) == len(rows) + 3
    steps, needs, block = 2 * 6, 2 * 2, result["shape"]["block_bytes"]
    on_demand, resident = rows["on-demand", 0.0], rows["all resident", 1.0]
    assert on_demand["bytes_per_step"] == needs * block
    assert (on_demand["hits"], on_demand["misses"]) == (0, steps * needs)
    assert rows["layer streaming", 0.0]["bytes_per_step"] == 2 * 8 * block
    assert (resident["hits"], resident["misses"], resident["bytes_per_step"]) == (steps * needs, 0, 0)
    for row in rows.values():
        if row["hits"] is not None:
            assert row["hits"] + row["misses"] == steps * needs
        assert row["tokens_per_second"]["min"] <= row["tokens_per_second"]["median"] <= row["tokens_per_second"]["max"]


def test_host_work_and_single_program_take_the_steps_of_the_engine() -> None:
    lm = load(expert_fraction=0.25, context=64, chunk=16, progress=False)
    prompt = _models.prompts(lm, 1, 8)[0]
    work = HostWork(lm._engine, prompt, 3)
    work.repeat()
    result = work.result()
    assert result["misses_per_token"] > 0
    assert set(result["us_per_layer_token"]) == {"real", "host", *COMPONENTS, "other", "real_unblocked"}

    resident = _models.with_cache(lm, 1.0, "lru")
    engine = resident._engine
    _run.start(engine, [prompt], SamplingOptions(), 20)
    _, tokens = SingleProgram(engine, engine._dense, engine.programs.span(20)).decode(6)
    np.testing.assert_array_equal(tokens, [engine.step([0])[0][0] for _ in range(6)])


def test_report_refuses_what_nothing_measured(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        _report.finish("some", {"rate": float("nan")})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "D", "D=", "D=0", "X=1", "D=1.5", "D=8,,F=8"])
def test_parse_shape_names_what_it_cannot_read(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="LETTER=NUMBER"):
        _models.parse_shape(text)
