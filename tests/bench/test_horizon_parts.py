"""The parts of the bench of horizons that need no model, and their analysis."""

from pathlib import Path

import pytest

from bench import _horizon_adaptation
from tests.replay.traces import made_up


def test_replays_have_three_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = made_up(sequences=2, length=40, block_bytes=1000)
    result = _horizon_adaptation.run(trace, 20, tmp_path / "h.png", predictor="history", wall=False)
    rows = result["replay"]
    assert len(rows) == len(_horizon_adaptation.RATIOS) * len(_horizon_adaptation.RESIDENCIES)
    for row in rows:
        assert len(row["horizon"]) == len(row["stall_share"]) == 60
        assert set(row["levels"]) == {"full", "cut", "restored"}
    stalls = rows[0]["stall_share"]
    assert sum(stalls[20:40]) > sum(stalls[40:])
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert "after restoring" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cut", "steps"),
    [([4.0] * 40, 3), ([1.0] * 10 + [4.0] * 30, 12), ([1.0] * 40, None), ([4.0, 1.0] * 5 + [4.0] * 30, 11)],
    ids=["at once", "after ten steps", "never moves", "to and fro"],
)
def test_when_a_horizon_has_followed(cut: list[float], steps: int | None) -> None:
    found = _horizon_adaptation.summary([1.0] * 40 + cut + [1.0] * 40, [0.0] * 120, 1.0)
    assert found["follows"]["cut"] == steps
    assert found["follows"]["restored"] == (None if steps is None else 3)
    assert found["levels"]["full"] == 1
