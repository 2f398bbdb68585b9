"""The timeline of a replay agrees with what the replay counts."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ef_jax.errors import InputError
from ef_jax.predict import Oracle
from ef_jax.replay.simulator import simulate
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Prefetch
from ef_jax.timeline import COMPUTE, DEMAND, PREFETCH, STALLS, STEPS, Timeline
from tests.replay.traces import made_up

LAYERS, BLOCK = 3, 1000
COMPUTE_SECONDS = 2e-3


def seconds(path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Total seconds by track, and the spans, of a saved timeline."""
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    total: dict[str, float] = defaultdict(float)
    for span in spans:
        total[span["cat"]] += span["dur"] / 1e6
    return total, spans


@pytest.mark.parametrize("prefetch", ["off", 2])
def test_a_timeline_adds_up_to_the_counts(tmp_path: Path, prefetch: Prefetch) -> None:
    timeline = Timeline()
    trace = made_up(layers=LAYERS, block_bytes=BLOCK)
    oracle = Oracle((step.routes for step in trace.steps()), layers=LAYERS, experts=trace.num_experts, recall=0.7)
    stats = simulate(
        trace,
        slots=16,
        fit=2,
        link=LinkModel(bandwidth=BLOCK / 1e-3, latency=1e-4),
        compute_seconds=COMPUTE_SECONDS,
        predictor="none" if prefetch == "off" else oracle,
        prefetch=prefetch,
        candidates="threshold",
        timeline=timeline,
    )
    timeline.save(tmp_path / "t.json")
    total, spans = seconds(tmp_path / "t.json")
    phase = stats.decode
    assert sum(phase.misses) > 0
    assert total[STEPS] == pytest.approx(phase.seconds)
    assert total[COMPUTE] == pytest.approx(phase.steps * LAYERS * COMPUTE_SECONDS)
    assert total[STALLS] == pytest.approx(phase.stall_seconds)
    assert sum(len(span["args"]["experts"]) for span in spans if span["cat"] == DEMAND) == sum(phase.misses)
    if prefetch == "off":
        assert total[DEMAND] == pytest.approx(phase.stall_seconds)
        assert PREFETCH not in total
        return
    fetched = [span for span in spans if span["cat"] == PREFETCH]
    assert len(fetched) * BLOCK == phase.bytes_prefetch > 0
    assert 0 < sum(span["name"].startswith("wasted") for span in fetched) * BLOCK <= phase.bytes_wasted


def test_prompts_are_shown(tmp_path: Path) -> None:
    trace = made_up(sequences=1, length=12, layers=LAYERS, block_bytes=BLOCK)
    phases = trace.phases.copy()
    phases[:6] = 0
    timeline = Timeline()
    stats = simulate(
        dataclasses.replace(trace, phases=phases),
        slots=6,
        link=LinkModel(bandwidth=BLOCK / 1e-3),
        compute_seconds=COMPUTE_SECONDS,
        prompt_seconds=COMPUTE_SECONDS,
        timeline=timeline,
    )
    timeline.save(tmp_path / "t.json")
    _, spans = seconds(tmp_path / "t.json")
    stalls = [span for span in spans if span["cat"] == STALLS and span["name"].startswith("prompt")]
    assert sum(span["dur"] / 1e6 for span in stalls) == pytest.approx(stats.prefill.stall_seconds)
    computed = [span for span in spans if span["cat"] == COMPUTE and span["name"].startswith("prompt")]
    assert sum(span["dur"] / 1e6 for span in computed) == pytest.approx(LAYERS * COMPUTE_SECONDS)
    assert [span["name"] for span in spans if span["cat"] == STEPS] == ["prompt"] + ["step"] * 6


def test_a_timeline_needs_a_link() -> None:
    with pytest.raises(InputError, match="a timeline needs a link"):
        simulate(made_up(), slots=8, timeline=Timeline())
