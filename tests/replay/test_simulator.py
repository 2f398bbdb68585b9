"""Replays: what they count, and what the simulated time comes to."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.predict import Oracle
from ef_jax.replay.layer_steps import layer_steps
from ef_jax.replay.simulator import PREDICTORS, compute_seconds_per_layer, simulate
from ef_jax.replay.stall_bound import stall_bound
from ef_jax.replay.trace import DECODE, PROMPT, RoutingTrace
from ef_jax.schedule.link_model import LinkModel
from ef_jax.stats import Stats
from tests.replay.traces import made_up

BLOCK = 1000


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return made_up(block_bytes=BLOCK, length=20, pregate=2)


def tiny(experts: Any, phases: Any = None, num_experts: int = 4) -> RoutingTrace:
    """One sequence, from ids `[N, L, K]`."""
    experts = np.asarray(experts, np.uint8)
    count = len(experts)
    return RoutingTrace(
        experts=experts,
        tokens=np.zeros(count, np.int32),
        offsets=np.array([0, count]),
        num_experts=num_experts,
        phases=np.full(count, DECODE, np.uint8) if phases is None else np.asarray(phases, np.uint8),
        block_bytes=BLOCK,
    )


@pytest.mark.parametrize("predictor", ["none", "history", "pregate", "oracle"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_accesses_bytes_and_seconds_add_up(trace, policy, batch, predictor):
    compute = [1e-3, 2e-3, 3e-3]
    settings: dict[str, Any] = {} if predictor == "none" else {"predictor": predictor, "prefetch": 3}
    link = LinkModel(bandwidth=1e6, latency=1e-4, block_overhead=1e-5)
    steps = list(trace.steps(batch))
    needed = np.sum([[len(set(np.ravel(rows).tolist())) for rows in step.routes] for step in steps], axis=0)
    stats = simulate(trace, slots=16, policy=policy, batch=batch, link=link, compute_seconds=compute, **settings)
    decode = stats.decode
    assert (decode.steps, decode.tokens) == (len(steps), trace.count)
    assert np.add(np.add(decode.hits, decode.late_hits), decode.misses).tolist() == needed.tolist()
    assert decode.bytes_demand == BLOCK * sum(decode.misses)
    assert decode.bytes_prefetch >= decode.bytes_wasted + BLOCK * sum(decode.late_hits)
    assert decode.seconds == pytest.approx(len(steps) * sum(compute) + decode.stall_seconds)
    assert 0 < stats.link_utilisation <= 1
    if policy != "static":  # which gives up no slot for a prediction
        assert (decode.bytes_prefetch > 0) >= (predictor == "oracle")
    assert stats.as_dict()["link_utilisation"] == stats.link_utilisation
    assert ("prefetched" in stats.table()) == (decode.bytes_prefetch > 0)
    if predictor == "none":
        counted = simulate(trace, slots=16, policy=policy, batch=batch).decode
        assert (counted.hits, counted.misses) == (decode.hits, decode.misses)
        assert counted.seconds == counted.stall_seconds == 0


def test_on_demand_every_call_is_waited_for(trace):
    stats = simulate(trace, slots=12, link=LinkModel(bandwidth=1e6, latency=1.0), compute_seconds=5.0)
    calls = int(stats.decode.stall_seconds)  # all the blocks together take less than one call's latency
    assert stats.decode.stall_seconds == pytest.approx(calls + sum(stats.decode.misses) * 1e-3)
    assert 0 < calls <= trace.count * trace.layers
    assert stats.decode.link_busy_seconds == pytest.approx(stats.decode.stall_seconds)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_an_infinitely_fast_link_never_stalls(trace, predictor):
    horizon = 0 if predictor == "none" else 2
    link = LinkModel(bandwidth=math.inf)
    stats = simulate(trace, slots=12, link=link, compute_seconds=1e-3, predictor=predictor, prefetch=horizon)
    assert stats.decode.stall_seconds == 0
    assert stats.decode.seconds == pytest.approx(trace.count * 3 * 1e-3)


def test_an_oracle_with_time_and_slots_stalls_at_the_first_layer_only(trace):
    """Two blocks a layer take less than a layer computes; the cache holds the layers to come."""
    link = LinkModel(bandwidth=1e6)
    stats = simulate(trace, slots=24, link=link, compute_seconds=4e-3, predictor="oracle", prefetch=2)
    assert sum(stats.decode.misses) <= 6
    assert stats.decode.stall_seconds <= 6e-3
    assert stats.decode.bytes_wasted == 0
    warm = simulate(trace, slots=24, link=link, compute_seconds=4e-3, predictor="oracle", prefetch=2, fit=1)
    assert warm.decode.stall_seconds == 0
    assert sum(warm.decode.misses) == sum(warm.decode.late_hits) == 0
    assert warm.decode.bytes_prefetch > 0


def test_a_better_oracle_stalls_less(trace):
    stalls = []
    for recall in (0.0, 0.6, 1.0):
        oracle = Oracle((step.routes for step in trace.steps(1)), layers=3, experts=16, recall=recall)
        link = LinkModel(bandwidth=1e6)
        stats = simulate(trace, slots=24, link=link, compute_seconds=4e-3, predictor=oracle, prefetch=1)
        stalls.append(stats.decode.stall_seconds)
    assert stalls[0] > 1.5 * stalls[1] > 3 * stalls[2]


@pytest.mark.parametrize("compute", [0.0, 5e-4, 3e-3])
@pytest.mark.parametrize("slots", [6, 18])
def test_no_replay_stalls_less_than_the_bound(trace, slots, compute):
    bound = stall_bound(layer_steps(trace), slots, block_bytes=BLOCK, bandwidth=1e6, layer_seconds=compute, staging=2)
    for predictor in PREDICTORS:
        stats = simulate(
            trace,
            slots=slots,
            link=LinkModel(bandwidth=1e6),
            compute_seconds=compute,
            predictor=predictor,
            prefetch=0 if predictor == "none" else 3,
        )
        assert stats.decode.stall_seconds >= bound.lower_seconds - 1e-9


def test_a_prompts_waves_hide_one_anothers_copies():
    """Four experts through two slots and a ring of two: waves of two blocks, one second each, that compute for 3 s."""
    trace = tiny([[[0, 1]], [[2, 3]], [[0, 2]]], [PROMPT, PROMPT, DECODE])
    stats = simulate(
        trace,
        slots=2,
        staging_slots=2,
        block_bytes=1,
        link=LinkModel(bandwidth=1.0),
        prompt_seconds=6.0,
        compute_seconds=1.0,
    )
    assert (stats.prefill.hits, stats.prefill.misses, stats.prefill.steps, stats.prefill.tokens) == ([0], [4], 1, 2)
    assert stats.prefill.stall_seconds == 2.0
    assert stats.prefill.seconds == 2.0 + 6.0
    assert (stats.prefill.link_busy_seconds, stats.prefill.bytes_demand) == (4.0, 4)
    assert (stats.decode.hits, stats.decode.misses) == ([1], [1])  # experts 0 and 1 found the free slots
    assert stats.decode.seconds == 1.0 + 1.0


def test_what_fits_entirely_is_there_from_the_beginning(trace):
    stats = simulate(trace, slots=48)
    assert stats.decode.misses == [0, 0, 0]
    assert sum(stats.decode.hits) == trace.count * 3 * 2


def test_fitted_sequences_teach_and_are_not_counted(trace):
    whole, seen = simulate(trace, slots=12, batch=1), []
    rest = simulate(trace, slots=12, batch=1, fit=4, on_pass=lambda step, residency: seen.append(residency.count[0]))
    first = simulate(trace.select(0, 4), slots=12, batch=1)
    for name in ("hits", "misses"):
        assert np.add(getattr(first.decode, name), getattr(rest.decode, name)).tolist() == getattr(whole.decode, name)
    assert rest.decode.steps == len(seen) == 40
    assert set(seen) == {4}


def test_the_hot_set_of_static_is_that_of_the_fitted_sequences():
    """Experts 0 and 1 come first, 2 and 3 are used most."""
    trace = tiny([[[0, 1]], *[[[2, 3]]] * 5])
    halves = dataclasses.replace(trace, offsets=np.array([0, 4, 6]))
    assert simulate(halves, slots=2, policy="static").decode.hits == [0]
    assert simulate(halves, slots=2, policy="static", fit=1).decode.hits == [4]


def test_a_policy_may_be_an_object_of_the_right_shape(trace):
    policy = make_policy("lru", layers=3, experts=16, cache_slots=12)
    assert simulate(trace, slots=12, policy=policy).decode.hits == simulate(trace, slots=12).decode.hits
    with pytest.raises(InputError, match="the policy is for 2 layers of 16 experts, and the trace has 3"):
        simulate(trace, slots=12, policy=make_policy("lru", layers=2, experts=16, cache_slots=12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "0 slots: give 1 to 48"),
        ({"slots": 49}, "49 slots: give 1 to 48"),
        ({"fit": 6}, "fit 6: leave at least one of the 6 sequences"),
        ({"policy": "fifo"}, "policy 'fifo' is not one of"),
        ({"predictor": "wizard"}, "predictor 'wizard' is not one of none, history, pregate, oracle"),
        ({"prefetch": 1}, "prefetch 1 needs a link"),
        ({"prefetch": 1, "link": LinkModel(bandwidth=1.0)}, "prefetch 1 needs a predictor"),
        ({"compute_seconds": [1.0, 2.0]}, "compute_seconds has 2 figures for 3 layers"),
        ({"prompt_seconds": -1.0}, "prompt_seconds -1.0: give 0 or more"),
        ({"batch": 0}, "batch 0: give at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(trace, settings, message):
    with pytest.raises(InputError, match=message):
        simulate(trace, **{"slots": 12, **settings})


def test_a_link_needs_the_size_of_a_block():
    unknown = made_up(length=4)
    with pytest.raises(InputError, match="how large an expert's block is: give block_bytes"):
        simulate(unknown, slots=12, link=LinkModel(bandwidth=1.0))
    assert simulate(unknown, slots=12, link=LinkModel(bandwidth=1.0), block_bytes=3).decode.bytes_demand > 0
    assert simulate(unknown, slots=12).decode.bytes_demand == 0


def test_compute_time_is_decode_time_without_stalls():
    stats = Stats.empty(layers=4, experts=8, slots=4, staging_slots=2)
    with pytest.raises(InputError, match="nothing was decoded"):
        compute_seconds_per_layer(stats)
    stats.decode.steps, stats.decode.seconds, stats.decode.stall_seconds = 10, 3.0, 1.0
    assert compute_seconds_per_layer(stats) == pytest.approx(2.0 / 40)
