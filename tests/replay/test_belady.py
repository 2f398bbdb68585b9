"""Belady's bound against every possible schedule, and what must hold of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.replay.belady import CacheCount, DemandRun, belady
from ef_jax.replay.layer_steps import PROMPT, LayerSteps, layer_steps
from ef_jax.replay.trace import RoutingTrace
from tests.replay.step_cases import EXPERTS, LAYERS, most_hits, needs, steps_of


def trace_of(rng: np.random.Generator, lengths: list[int], *, layers=3, experts=8, top_k=2, **fields) -> RoutingTrace:
    tokens = sum(lengths)
    return RoutingTrace(
        experts=rng.random((tokens, layers, experts)).argsort(-1)[..., :top_k].astype(np.uint8),
        tokens=np.zeros(tokens, np.int32),
        offsets=np.cumsum([0, *lengths]),
        num_experts=experts,
        **{"phases": np.ones(tokens, np.uint8), **fields},
    )


def slow_belady(steps: LayerSteps, slots: int) -> int:
    """Hits of the textbook rule, for steps without prompts that fit the slots."""
    sets = [set(steps.keys[a:b].tolist()) for a, b in zip(steps.starts, steps.starts[1:], strict=False)]
    cache: set[int] = set()
    hits = 0
    for step, needed in enumerate(sets):
        hits += len(needed & cache)

        def next_use(key: int, step: int = step) -> int:
            return next((i for i in range(step + 1, len(sets)) if key in sets[i]), len(sets))

        others = sorted(cache - needed, key=next_use)
        cache = needed | set(others[: slots - len(needed)])
    return hits


@settings(max_examples=300, deadline=None)
@given(needs=needs(7), slots=st.integers(0, 5), bypass=st.booleans())
def test_no_demand_schedule_hits_more_and_one_hits_as_often(needs, slots, bypass):
    steps = steps_of(needs)
    assert sum(belady(steps, slots, bypass=bypass).hits) == most_hits(steps, slots, bypass=bypass)


@settings(max_examples=100, deadline=None)
@given(needs=needs(30), slots=st.integers(0, LAYERS * EXPERTS))
def test_more_slots_and_bypass_never_hurt(needs, slots):
    steps = steps_of(needs)
    hits = sum(belady(steps, slots).hits)
    assert hits <= sum(belady(steps, slots, bypass=True).hits)
    assert hits <= sum(belady(steps, slots + 1).hits)


@pytest.mark.parametrize("bypass", [False, True])
def test_only_cold_misses_where_everything_fits(bypass):
    steps = layer_steps(trace_of(np.random.default_rng(0), [40]))
    count = belady(steps, steps.num_keys, bypass=bypass)
    cold = [len({key for key in steps.keys.tolist() if key // 8 == layer}) for layer in range(3)]
    assert count == CacheCount(hits=[80 - misses for misses in cold], misses=cold)
    assert belady(steps, 0, bypass=bypass) == CacheCount(hits=[0] * 3, misses=[80] * 3)


def test_long_runs_agree_with_the_textbook():
    steps = layer_steps(trace_of(np.random.default_rng(1), [300]))
    for slots in (2, 7, 16):
        assert sum(belady(steps, slots).hits) == slow_belady(steps, slots)


def test_a_run_may_be_cut_anywhere():
    steps = layer_steps(trace_of(np.random.default_rng(2), [50, 30]), batch=2)
    whole = DemandRun(steps, 9, bypass=True).run(0, len(steps))
    parts = DemandRun(steps, 9, bypass=True)
    assert parts.run(0, 31) + parts.run(31, 32) + parts.run(32, len(steps)) == whole


def test_counting_starts_late_with_a_cache_that_ran_before():
    steps = layer_steps(trace_of(np.random.default_rng(3), [60]))
    everything, before = belady(steps, 24), DemandRun(steps, 24).run(0, 90)
    late = belady(steps, 24, count_from=90)
    assert sum(late.misses) == sum(everything.misses) - sum(before)
    assert sum(late.hits) + sum(late.misses) == 2 * (len(steps) - 90)


def test_a_free_start_is_the_best_start():
    steps = layer_steps(trace_of(np.random.default_rng(4), [60]))
    prompt = steps_of([(PROMPT, list(range(24)))], layers=3, experts=8)
    for slots in (3, 8, 20):
        free = DemandRun(steps, slots, free_start=0).run(0, len(steps))
        assert free == DemandRun(prompt.followed_by(steps), slots).run(0, len(steps) + 1)[1:]


def test_steps_hold_each_expert_of_a_batch_once():
    trace = trace_of(np.random.default_rng(5), [5, 3, 4])
    steps = layer_steps(trace, batch=2)
    run = list(trace.steps(batch=2))
    assert steps.layers.tolist() == [0, 1, 2] * len(run)
    for step, layer in enumerate(steps.layers.tolist()):
        wanted = {layer * 8 + expert for row in run[step // 3].routes[layer] for expert in row}
        assert steps.keys[steps.starts[step] : steps.starts[step + 1]].tolist() == sorted(wanted)
    assert steps.widest == max(np.diff(steps.starts))


def test_a_recorded_prompt_is_one_entry_and_costs_nothing():
    phases = np.array([0, 0, 0, 1, 1, 0, 0, 1], np.uint8)
    passes = np.array([0, 0, 1, 4, 5, 2, 2, 4], np.int64)  # the first prompt in two chunks, the second after it
    trace = trace_of(np.random.default_rng(6), [5, 3], phases=phases, passes=passes)
    steps = layer_steps(trace)
    assert steps.layers.tolist() == [PROMPT, 0, 1, 2, 0, 1, 2]
    prompt = trace.experts[phases == 0] + np.arange(3)[:, None] * 8
    assert steps.keys[: steps.starts[1]].tolist() == sorted(set(prompt.ravel().tolist()))
    used_first = set(steps.keys[steps.starts[1] :].tolist()) - set(prompt.ravel().tolist())
    assert sum(belady(steps, steps.num_keys).misses) == len(used_first)


def test_bad_figures_are_refused():
    steps = steps_of([(0, [0, 1]), (1, [3])])
    with pytest.raises(InputError, match="-1 cache slots"):
        belady(steps, -1)
    with pytest.raises(InputError, match="count_from 3"):
        belady(steps, 2, count_from=3)
    with pytest.raises(InputError, match="followed by 3 x 8"):
        steps.followed_by(steps_of([(0, [0])], layers=3, experts=8))
