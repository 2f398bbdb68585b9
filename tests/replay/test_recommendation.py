import dataclasses

import pytest

from ef_jax.replay.capacity import Capacity
from ef_jax.replay.recommendation import recommend, sweep_warnings
from ef_jax.replay.result import ReplayResult, Timing

EXPERTS, CYCLE = 200, 20


def row(policy: str, share: float, rate: float, *, step_ms: float | None = None, bound: bool = False) -> ReplayResult:
    """A row of 1000 steps; with `step_ms`, over a link."""
    uses = 1000 * CYCLE
    timing = Timing(
        bandwidth=25e9,
        stall_seconds=1.0,
        step_seconds=None if step_ms is None else step_ms / 1e3,
        tokens_per_second=None if not step_ms else 1e3 / step_ms,
        link_utilisation=0.5,
        bytes_wasted=0,
        stall_lower_seconds=0.5,
        stall_clairvoyant_seconds=0.75,
    )
    return ReplayResult(
        policy=policy,
        bound=bound,
        capacity=Capacity(share, round(share * EXPERTS)),
        batch=1,
        steps=1000,
        tokens=1000,
        hits=round(rate * uses),
        late_hits=0,
        misses=uses - round(rate * uses),
        bytes=None,
        replay_seconds=0.0,
        timing=None if step_ms is None else timing,
    )


def test_without_a_link_the_knee_of_the_best_policy() -> None:
    results = [
        row("lru", 0.125, 0.26),
        row("lfu", 0.125, 0.29),
        row("belady", 0.125, 0.55, bound=True),
        row("lru", 0.25, 0.45),
        row("lfu", 0.25, 0.48),
        row("belady", 0.25, 0.72, bound=True),
        row("lru", 0.5, 0.71),
        row("lfu", 0.5, 0.72),
        row("belady", 0.5, 0.89, bound=True),
    ]
    recommended = recommend(results)
    assert recommended is not None
    assert (recommended.policy, recommended.capacity.slots, recommended.hit_rate) == ("lfu", 50, 0.48)
    assert "23.0 points above the 25.0 %" in recommended.reason
    assert recommended.warning == ""
    assert recommended.as_dict()["capacity"] == 0.25


def test_with_a_link_the_fewest_slots_that_are_nearly_the_fastest() -> None:
    results = [
        row("lru", 0.25, 0.45, step_ms=12.0),
        row("lfu", 0.25, 0.48, step_ms=11.0),
        row("lru", 0.5, 0.71, step_ms=10.3),
        row("lfu", 0.5, 0.70, step_ms=10.4),
        row("lru", 1.0, 0.99, step_ms=10.0),
        row("lfu", 1.0, 0.99, step_ms=10.0),
        row("belady", 0.25, 0.7, bound=True),
    ]
    recommended = recommend(results)
    assert recommended is not None
    assert (recommended.policy, recommended.capacity.slots) == ("lru", 100)
    assert recommended.reason == (
        "the fewest slots within 5 % of the best speed of this sweep, 100.0 tokens/s at 25 GB/s"
    )


def test_steps_that_take_no_time_are_the_fastest() -> None:
    results = [row("lru", 0.5, 0.7, step_ms=1e-6), row("lru", 1.0, 0.9, step_ms=0.0)]
    recommended = recommend(results)
    assert recommended is not None
    assert recommended.capacity.slots == 200


@pytest.mark.parametrize("step_ms", [None, 5.0])
def test_uniform_routing_gets_no_policy(step_ms: float | None) -> None:
    results = [
        row(policy, share, share + luck, step_ms=step_ms)
        for share in (0.25, 0.5)
        for policy, luck in (("lru", -0.002), ("lfu", 0.004))
    ]
    recommended = recommend(results)
    assert recommended is not None
    assert "no policy helps" in recommended.warning
    if step_ms is None:
        assert recommended.capacity.slots == 100
        assert "no policy helps" in recommended.reason


def test_a_gain_beyond_chance_is_a_gain() -> None:
    recommended = recommend([row("lru", 0.25, 0.27)])
    assert recommended is not None
    assert recommended.warning == ""
    few = dataclasses.replace(row("lru", 0.25, 0.27), hits=27, misses=73, steps=5)
    recommended = recommend([few])
    assert recommended is not None
    assert "no policy helps" in recommended.warning


def test_below_a_token_cycle_everything_warns() -> None:
    results = [row("lru", 0.05, 0.4), row("lfu", 0.05, 0.3), row("lru", 0.1, 0.11)]
    recommended = recommend(results)
    assert recommended is not None
    line = "10 slots are fewer than the 20 experts that one step touches: most are evicted before they are needed again"
    assert recommended.warning == line
    assert sweep_warnings(results, experts=EXPERTS) == [line]


def test_a_short_trace_warns() -> None:
    short = dataclasses.replace(row("lru", 0.5, 0.6), hits=600, misses=400, steps=50)
    assert sweep_warnings([short], experts=EXPERTS) == [
        "the trace counts 1000 uses of 200 experts, so hit rates are much those of a cache that is still filling: "
        "record 4000 or more"
    ]


def test_bounds_alone_recommend_nothing() -> None:
    assert recommend([row("belady", 0.5, 0.9, bound=True)]) is None
