"""The timeline of a run agrees with its stats, and notes nothing outside of its block."""

import json
from pathlib import Path

import pytest

import ef_jax
from bench._emulated import EmulatedModels
from ef_jax.schedule.link_model import LinkModel
from ef_jax.timeline import COMPUTE, DEMAND, PREFETCH, STALLS, STEPS


def test_a_timeline_shows_what_a_run_did(models: EmulatedModels, tmp_path: Path) -> None:
    lm = models.make(0.25, LinkModel(bandwidth=500e6), prefetch=2, order="together")
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
    waves = [name for name in names if name.startswith("prompt, wave")]
    assert len(names) == 8 * 7 + 8 + 8 + len(waves)
    assert by_track[PREFETCH]
    first, last = by_track[STEPS][0], by_track[STEPS][-1]
    for span in spans:
        if span["cat"] in (COMPUTE, STALLS):
            assert span["ts"] >= first["ts"]
            assert span["ts"] + span["dur"] <= last["ts"] + last["dur"] + 1
    assert sum(len(span["args"]["experts"]) for span in by_track[DEMAND]) > 0
    stalls = [span for span in spans if span["cat"] == STALLS and span["name"].startswith("layer")]
    assert stalls
    assert all(span["args"]["missing"] or span["args"]["late"] for span in stalls)


def test_one_timeline_at_a_time(models: EmulatedModels) -> None:
    lm = models.lm
    with lm.timeline(), pytest.raises(ef_jax.InputError, match="a timeline is being noted already"), lm.timeline():
        pass
    with lm.timeline() as timeline:
        pass
    assert timeline.dropped == 0
