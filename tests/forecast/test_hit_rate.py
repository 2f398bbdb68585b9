"""Hit rates by the cache's size against what was measured, and by replaying."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.forecast import HitRate, distinct_experts, prior_hit_rate, replayed_hit_rate
from ef_jax.loading import bundled_model
from ef_jax.replay.simulator import simulate
from ef_jax.weights.model_config import read_model_config
from tests.forecast.specs import released, small_with
from tests.replay.traces import made_up

_RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
_MODELS = {
    "policies": read_model_config(bundled_model())[0],
    "policies_deepseek_v2_lite": released("deepseek-v2-lite"),
}


@pytest.mark.parametrize("name", list(_MODELS))
def test_the_band_holds_the_measured_curves(name: str) -> None:
    spec = _MODELS[name]
    rows = json.loads((_RESULTS / f"{name}.json").read_text())["quality"]
    measured = {row["slots"]: row["hit_rate"] for row in rows if row["policy"] == "lru"}
    assert len(measured) == 3
    for slots, hits in measured.items():
        rate = prior_hit_rate(spec, slots, 1)
        assert rate.low <= hits <= rate.high
        assert rate.expected == pytest.approx(hits, abs=0.07)


# Replays of the same two models' traces with several sequences side by side: (batch, share of slots, hit rate).
@pytest.mark.parametrize(
    ("name", "batch", "share", "hits"),
    [
        ("policies_deepseek_v2_lite", 4, 0.125, 0.192),
        ("policies_deepseek_v2_lite", 4, 0.25, 0.362),
        ("policies_deepseek_v2_lite", 4, 0.5, 0.627),
        ("policies", 8, 0.125, 0.171),
        ("policies", 8, 0.25, 0.325),
        ("policies", 8, 0.5, 0.596),
        ("policies", 31, 0.25, 0.258),
    ],
)
def test_the_band_holds_replays_of_batches(name: str, batch: int, share: float, hits: float) -> None:
    spec = _MODELS[name]
    rate = prior_hit_rate(spec, round(share * spec.total_experts), batch)
    assert rate.low <= hits <= rate.high
    assert rate.expected == pytest.approx(hits, abs=0.07)


@given(
    experts=st.integers(2, 64),
    top_k=st.integers(1, 8),
    layers=st.integers(1, 6),
    batch=st.integers(1, 32),
    slots=st.integers(0, 400),
)
def test_prior_rises_with_slots(experts: int, top_k: int, layers: int, batch: int, slots: int) -> None:
    spec = small_with(num_experts=experts, num_experts_per_tok=min(top_k, experts), num_hidden_layers=layers)
    fewer, more = prior_hit_rate(spec, slots, batch), prior_hit_rate(spec, slots + 1, batch)
    for name in ("low", "expected", "high"):
        assert 0 <= getattr(fewer, name) <= getattr(more, name) + 1e-12 <= 1 + 1e-12
    assert fewer.low <= fewer.expected <= fewer.high
    if slots >= spec.total_experts:
        assert fewer.low == 1.0
    elif slots:
        assert fewer.low >= 0.99 * slots / spec.total_experts  # no worse than chance


@given(experts=st.integers(1, 300), share=st.floats(0.01, 1), tokens=st.integers(1, 5000))
def test_distinct_experts(experts: int, share: float, tokens: int) -> None:
    top_k = max(1, round(share * experts))
    found = distinct_experts(experts, top_k, tokens)
    assert top_k - 1e-9 <= found <= min(experts, top_k * tokens) + 1e-9
    assert found <= distinct_experts(experts, top_k, tokens + 1) + 1e-9
    if tokens == 1:
        assert found == pytest.approx(top_k)


def test_a_trace_is_replayed_at_the_slots() -> None:
    trace = made_up(layers=2, experts=4, top_k=2)
    spec = small_with(num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    rate = replayed_hit_rate(spec, trace, 3, 2)
    phase = simulate(trace, slots=3, policy="lru", batch=2).decode
    assert rate.expected == sum(phase.hits) / (sum(phase.hits) + sum(phase.misses))
    assert rate.low <= rate.expected <= rate.high
    assert "240 recorded tokens" in rate.source
    assert replayed_hit_rate(spec, trace, 8, 2).expected == 1.0
    assert replayed_hit_rate(spec, trace.select(0, 1), 3, 1).low > 0  # nothing to halve


def test_a_trace_of_another_model() -> None:
    with pytest.raises(InputError, match=r"of 3 layers of 16 experts, top-2, and the model has 2 of 4, top-2"):
        replayed_hit_rate(small_with(num_experts=4, num_hidden_layers=2), made_up(), 3, 1)


def test_what_is_no_hit_rate() -> None:
    with pytest.raises(InputError, match="must rise from 0 to 1"):
        HitRate(expected=0.5, low=0.6, high=0.7, source="")
