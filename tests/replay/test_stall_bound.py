"""The bounds on stalls against every possible schedule, and where they must meet."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.replay.aggressive import aggressive_schedule
from ef_jax.replay.layer_steps import PROMPT, LayerSteps
from ef_jax.replay.stall_bound import StallBound, stall_bound
from ef_jax.replay.window_loads import window_loads
from tests.replay.step_cases import EXPERTS, LAYERS, least_time, most_hits, needs, steps_of

seconds = st.integers(0, 3)


def bound_of(steps: LayerSteps, slots: int, block_seconds: float, layer_seconds: float | list[int], **options):
    """The bound where a block takes so many seconds."""
    return stall_bound(steps, slots, block_bytes=1, bandwidth=1 / block_seconds, layer_seconds=layer_seconds, **options)


def random_steps(tokens: int, *, layers: int = 4, experts: int = 16, top_k: int = 3, seed: int = 0) -> LayerSteps:
    """Skewed routing of one sequence."""
    rng = np.random.default_rng(seed)
    scores = rng.random((tokens, layers, experts)) * np.linspace(1, 2, experts)
    chosen = scores.argsort(-1)[..., -top_k:]
    return steps_of(
        [(layer, (layer * experts + chosen[t, layer]).tolist()) for t in range(tokens) for layer in range(layers)],
        layers=layers,
        experts=experts,
    )


@settings(max_examples=120, deadline=None)
@given(
    needs=needs(5),
    spare=st.integers(0, 3),
    block=st.integers(1, 3),
    layers=st.tuples(seconds, seconds),
    window=st.integers(0, 5),
    stride=st.integers(1, 3),
)
def test_the_least_stall_lies_between_the_bounds(needs, spare, block, layers, window, stride):
    steps = steps_of(needs)
    slots = max(1, steps.widest + spare)
    fewest = window_loads(steps, slots, window=window, stride=stride)
    bound = bound_of(steps, slots, block, list(layers), fewest=fewest)
    stall = least_time(steps, slots, block_seconds=block, layer_seconds=layers) - bound.compute_seconds
    assert bound.lower_seconds - 1e-9 <= stall <= bound.achievable_seconds + 1e-9
    accesses = sum(len(keys) for layer, keys in needs if layer != PROMPT)
    assert bound.fewest_loads == accesses - most_hits(steps, slots, bypass=False) <= bound.loads


@settings(max_examples=60, deadline=None)
@given(needs=needs(9), spare=st.integers(0, 3), data=st.data())
def test_no_contents_of_the_slots_serve_a_window_with_fewer_loads(needs, spare, data):
    steps = steps_of(needs)
    slots = max(1, steps.widest + spare)
    window, stride = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
    everything = (PROMPT, list(range(LAYERS * EXPERTS)))
    whole = window_loads(steps, slots, count_from=0, window=window, stride=stride)
    for part in whole.windows:
        least = [0]
        for last in range(part.first, len(needs)):
            stretch = [everything, *needs[part.first - 1 : last + 1]]
            decode = sum(len(keys) for layer, keys in stretch if layer != PROMPT)
            least.append(decode - most_hits(steps_of(stretch), slots, bypass=False))
        counted = part.last - part.first
        assert part.cumulative.tolist() == least[1 : counted + 1]
        since = whole.cumulative[part.last :] - whole.cumulative[part.last]
        assert (part.least + since <= least[counted:]).all()


@settings(max_examples=100, deadline=None)
@given(needs=needs(20), spare=st.integers(0, 3), block=st.integers(1, 3), data=st.data())
def test_a_late_count_allows_any_slots_at_its_start(needs, spare, block, data):
    first = data.draw(st.integers(1, len(needs)))
    steps, slots = steps_of(needs), max(1, steps_of(needs).widest + spare)
    late = bound_of(steps, slots, block, 1, count_from=first)
    free = bound_of(steps_of([(PROMPT, list(range(6))), *needs[first:]]), slots, block, 1)
    assert late.lower_seconds == pytest.approx(free.lower_seconds)
    assert late.lower_seconds <= late.achievable_seconds + 1e-9
    assert late.compute_seconds == sum(layer != PROMPT for layer, _ in needs[first:])


@settings(max_examples=100, deadline=None)
@given(needs=needs(20, prompts=False), block=st.integers(1, 3), layers=st.tuples(seconds, seconds))
def test_the_bounds_meet_where_everything_fits(needs, block, layers):
    steps = steps_of(needs)
    bound = bound_of(steps, LAYERS * EXPERTS, block, list(layers))
    assert bound.lower_seconds == pytest.approx(bound.achievable_seconds)
    assert bound.loads == bound.fewest_loads


@pytest.mark.parametrize(("block", "compute"), [(3.0, 2.0), (1.0, 3.0)])
def test_steps_without_reuse_wait_for_the_link_or_for_nothing(block, compute):
    count = 40
    steps = steps_of([(0, [2 * step, 2 * step + 1]) for step in range(count)], layers=1, experts=2 * count)
    bound = bound_of(steps, 4, block, compute)
    exposed = max(0.0, 2 * block - compute)  # of each layer-step but the first, of which nothing is hidden
    assert bound.lower_seconds == pytest.approx(2 * block + (count - 1) * exposed)
    assert bound.achievable_seconds == pytest.approx(2 * block + (count - 1) * exposed)


def test_a_dominating_block_time_leaves_all_loads_exposed():
    steps = random_steps(60)
    bound = bound_of(steps, 20, 1e6, 1.0)
    assert bound.lower_seconds == pytest.approx(bound.fewest_loads * 1e6, rel=1e-4)
    assert bound.fewest_loads * 1e6 < bound.achievable_seconds <= bound.loads * 1e6
    assert bound.loads < 1.1 * bound.fewest_loads


def test_an_infinite_bandwidth_leaves_no_stall():
    bound = stall_bound(random_steps(30), 12, block_bytes=1 << 20, bandwidth=math.inf, layer_seconds=1e-4)
    assert (bound.lower_seconds, bound.achievable_seconds) == (0.0, 0.0)
    overhead = stall_bound(
        random_steps(30), 12, block_bytes=1 << 20, bandwidth=math.inf, layer_seconds=1e-4, block_overhead=1e-3
    )
    assert overhead.lower_seconds > 0


def test_bandwidth_slots_and_longer_windows_close_the_bracket():
    steps = random_steps(80)
    fast = [bound_of(steps, 24, block, 1.0) for block in (0.1, 0.3, 1.0)]
    assert [b.lower_seconds for b in fast] == sorted(b.lower_seconds for b in fast)
    slots = [bound_of(steps, count, 0.3, 1.0) for count in (12, 24, 40)]
    assert [b.lower_seconds for b in slots] == sorted((b.lower_seconds for b in slots), reverse=True)
    fewest = [window_loads(steps, 24, window=window, stride=1) for window in (0, 16, 64, 320)]
    windows = [bound_of(steps, 24, 0.3, 1.0, fewest=each).lower_seconds for each in fewest]
    assert windows == sorted(windows)
    tight = bound_of(steps, 24, 1.0, 1.0, fewest=fewest[-1])
    assert 0.9 * tight.achievable_seconds < tight.lower_seconds <= tight.achievable_seconds


def test_staging_slots_count_as_slots():
    steps = random_steps(20)
    assert bound_of(steps, 12, 1.0, 1.0, staging=6) == bound_of(steps, 18, 1.0, 1.0)


def test_the_schedule_waits_for_a_slot_that_computes():
    steps = steps_of([(0, [0]), (0, [1]), (0, [2])])
    ends, fetched = aggressive_schedule(steps, 2, block_seconds=2.0, compute_seconds=np.array([3.0, 3.0, 3.0]))
    assert ends.tolist() == [5.0, 8.0, 11.0]  # key 2 can only cross from 5 on, when key 0 leaves
    assert fetched.tolist() == [2, 3, 3]


def test_the_schedule_does_no_harm():
    needs = [(0, [0, 1]), (0, [0, 1]), (0, [0, 1]), (0, [2])]
    ends, fetched = aggressive_schedule(steps_of(needs), 2, block_seconds=1.0, compute_seconds=np.ones(4))
    assert fetched.tolist() == [2, 2, 2, 3]
    assert ends.tolist() == [3.0, 4.0, 5.0, 7.0]


def test_windows_have_a_length_and_a_stride():
    for figures in ({"window": -1}, {"stride": 0}):
        with pytest.raises(InputError, match="at least 0 and 1"):
            window_loads(random_steps(3), 8, **figures)


def test_an_empty_count_is_all_zeros():
    steps = random_steps(3)
    assert bound_of(steps, 12, 1.0, 1.0, count_from=len(steps)) == StallBound(
        lower_seconds=0.0, achievable_seconds=0.0, compute_seconds=0.0, fewest_loads=0, loads=0
    )


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"bandwidth": 0.0}, "bandwidth 0.0"),
        ({"bandwidth": math.nan}, "bandwidth nan"),
        ({"block_bytes": 0}, "block_bytes 0"),
        ({"block_overhead": -1e-6}, "block_overhead -1e-06"),
        ({"layer_seconds": -1.0}, "layer_seconds -1.0"),
        ({"layer_seconds": [1.0]}, r"shape \(1,\): give one time, or 4"),
        ({"count_from": 13}, "count_from 13: choose 0 to 12"),
        ({"slots": 2}, "2 cache slots and 0 for staging: a layer-step needs 3"),
        ({"staging": -1}, "-1 for staging"),
        ({"fewest": window_loads(random_steps(3), 9)}, "of 9 slots, counted from 0, given for 8 slots"),
    ],
)
def test_bad_figures_are_refused(figures, message):
    given = {"slots": 8, "block_bytes": 1, "bandwidth": 1.0, "layer_seconds": 1.0, **figures}
    with pytest.raises(InputError, match=message):
        stall_bound(random_steps(3), **given)
