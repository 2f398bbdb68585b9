"""The timeline of a run agrees with its stats, and notes nothing outside of its block."""

import json
from pathlib import Path
from typing import Any

import pytest

import ef_jax
from ef_jax.timeline import COMPUTE, DEMAND, PREFETCH, STALLS, STEPS


@pytest.fixture(scope="module")
def lm() -> Any:
    return ef_jax.load(expert_fraction=0.25, context=64, chunk=16, prefetch=2, emulate_link="500MB/s", progress=False)


def test_a_timeline_shows_what_the_stats_count(lm: Any, tmp_path: Path) -> None:
    lm.stats.reset()
    with lm.timeline() as timeline:
        lm.generate("ROMEO:", max_new_tokens=8, ignore_eos=True)
    lm.generate("ROMEO:", max_new_tokens=3)
    timeline.save(tmp_path / "t.json")
    spans = [event for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if event["ph"] == "X"]
    by_track = {track: [span for span in spans if span["cat"] == track] for track in (STEPS, COMPUTE, DEMAND, PREFETCH)}
    assert [span["name"] for span in by_track[STEPS]] == ["prompts"] + ["step"] * 7
    names = [span["name"] for span in by_track[COMPUTE]]
    for layer in range(8):
        assert names.count(f"layer {layer}") == 7
        assert names.count(f"prompt, layer {layer}") == 1
    assert names.count("head") == 8
    assert by_track[PREFETCH]
    first, last = by_track[STEPS][0], by_track[STEPS][-1]
    for span in spans:
        if span["cat"] in (COMPUTE, STALLS):
            assert span["ts"] >= first["ts"]
            assert span["ts"] + span["dur"] <= last["ts"] + last["dur"] + 1
    assert sum(len(span["args"]["experts"]) for span in by_track[DEMAND]) > 0


def test_one_timeline_at_a_time(lm: Any) -> None:
    with lm.timeline(), pytest.raises(ef_jax.InputError, match="a timeline is being noted already"), lm.timeline():
        pass
    with lm.timeline() as timeline:
        pass
    assert timeline.dropped == 0
