"""The bench of policies runs, and its last line is strict JSON of every policy and bound."""

import json
import sys
from pathlib import Path

import pytest

from bench import policies
from ef_jax.memory.policies import POLICIES
from ef_jax.replay.replays import BOUNDS
from tests.replay.traces import made_up


def test_it_prints_tables_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(sequences=3, length=20).save(tmp_path / "trace.npz")
    words = [
        str(tmp_path / "trace.npz"),
        "--capacity",
        "0.25,0.5",
        "--repeats",
        "1",
        "--save",
        str(tmp_path / "r.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["policies", *words])
    monkeypatch.setattr(policies, "_COST_STEPS", 2)
    monkeypatch.setattr(policies, "_ENGINE_TOKENS", 8)
    assert policies.main() == 0
    line = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(line)
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert str(tmp_path) not in line
    names = [*POLICIES, *BOUNDS]
    assert [(row["capacity"], row["policy"]) for row in result["quality"]] == [
        (c, n) for c in (0.25, 0.5) for n in names
    ]
    assert all(row["accesses"] == 20 * 3 * 2 for row in result["quality"])  # two of three sequences teach
    assert [row["policy"] for row in result["collapse"]] == ["lru without floors", *names]
    assert result["collapse"][0]["hit_rate"] == 0
    assert list(result["cost"]["us_per_layer"]) == list(POLICIES)
