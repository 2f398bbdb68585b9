"""Micro-batches whose exchanges are hidden: the predicted times are those of the schedule, played event by event."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.mesh.overlap import LayerCosts, LinearCost, choose_split, pass_seconds

PARTS = ("attend", "send", "experts", "collect")
SECONDS = st.integers(0, 20).map(float)  # sums of whole numbers are exact in any order
COSTS = st.builds(LayerCosts, **{part: st.builds(LinearCost, fixed=SECONDS, per_row=SECONDS) for part in PARTS})
CUTS = st.tuples(st.integers(1, 24), st.integers(1, 6)).filter(lambda cut: cut[1] <= cut[0])
LAYERS = st.integers(1, 4)


def played(costs: LayerCosts, rows: int, micro_batches: int, layers: int) -> float:
    """The end of the schedule on a clock that ticks: each second, what may begin does."""
    sizes = [rows // micro_batches + (place >= micro_batches - rows % micro_batches) for place in range(micro_batches)]
    needs = {"send": "attend", "experts": "send", "collect": "experts"}
    order = ["attend 0"]
    for place in range(micro_batches):
        order += [f"attend {place + 1}"] * (place + 1 < micro_batches) + [f"experts {place}"]
    compute = [(layer, *word.split()) for layer in range(layers) for word in order]
    follows = {"attend": "send", "experts": "collect"}
    queues = [compute, [(layer, follows[part], place) for layer, part, place in compute]]
    done: dict[tuple[int, str, str], float] = {}
    ends, now = [0.0, 0.0], 0.0
    while any(queues):
        for at, queue in enumerate(queues):
            while queue and ends[at] <= now:
                layer, part, place = queue[0]
                before = (layer, needs[part], place) if part in needs else (layer - 1, "collect", place)
                if before[0] >= 0 and not done.get(before, now + 1) <= now:
                    break
                ends[at] = done[queue.pop(0)] = now + getattr(costs, part).seconds(sizes[int(place)])
        waiting = [end for end in ends if end > now]
        now = min(waiting, default=now)
    return max(ends)


@given(COSTS, CUTS, LAYERS)
def test_as_played(costs: LayerCosts, cut: tuple[int, int], layers: int) -> None:
    assert pass_seconds(costs, *cut, layers=layers) == played(costs, *cut, layers)


@given(COSTS, CUTS, LAYERS)
def test_bounds(costs: LayerCosts, cut: tuple[int, int], layers: int) -> None:
    rows, count = cut
    sizes = [len(range(place, rows, count)) for place in range(count)]
    work = {part: layers * sum(getattr(costs, part).seconds(size) for size in sizes) for part in PARTS}
    found = pass_seconds(costs, *cut, layers=layers)
    assert found >= max(work["attend"] + work["experts"], work["send"] + work["collect"])
    assert found >= layers * costs.alone(max(sizes))  # one micro-batch's own way
    assert found <= sum(work.values())
    if count == 1:
        assert found == layers * costs.alone(rows)


@given(COSTS, CUTS, LAYERS, st.sampled_from(PARTS), st.sampled_from(("fixed", "per_row")))
def test_dearer_parts_make_no_pass_shorter(
    costs: LayerCosts, cut: tuple[int, int], layers: int, part: str, name: str
) -> None:
    cost = getattr(costs, part)
    dearer = dataclasses.replace(costs, **{part: dataclasses.replace(cost, **{name: getattr(cost, name) + 1})})
    assert pass_seconds(dearer, *cut, layers=layers) >= pass_seconds(costs, *cut, layers=layers)


@given(COSTS)
@settings(max_examples=30)
def test_two_micro_batches_are_computed_in_a_good_order(costs: LayerCosts) -> None:
    """Two even ones, in two layers: at worst, where one of the exchanges is free, the best order takes 5/7 as long."""
    steps = [(layer, part, place) for layer in range(2) for part in ("attend", "experts") for place in range(2)]

    def seconds(order: tuple[tuple[int, str, int], ...]) -> float:
        computed = exchanged = 0.0
        back: dict[int, float] = {0: 0.0, 1: 0.0}
        for _, part, place in order:
            work, move = (costs.attend, costs.send) if part == "attend" else (costs.experts, costs.collect)
            computed = max(computed, back[place]) + work.seconds(3)
            exchanged = back[place] = max(exchanged, computed) + move.seconds(3)
        return exchanged

    halves = [[step for step in steps if step[2] == place] for place in range(2)]
    orders = []
    for first in itertools.combinations(range(8), 4):
        left, right = iter(halves[0]), iter(halves[1])
        orders.append(tuple(next(left) if place in first else next(right) for place in range(8)))
    best = min(map(seconds, orders))
    assert best <= pass_seconds(costs, 6, 2, layers=2) <= 1.4 * best


def cost(fixed: float, per_row: float) -> LinearCost:
    return LinearCost(fixed=fixed, per_row=per_row)


def test_exchanges_are_hidden_where_they_cost() -> None:
    costs = LayerCosts(attend=cost(1, 1), send=cost(1, 1), experts=cost(1, 1), collect=cost(1, 1))
    found = choose_split(costs, 64, layers=10)
    assert list(found.seconds) == [1, 2, 4, 8]
    assert found.seconds[1] == 10 * costs.alone(64) == 2600
    assert found.seconds[2] == 10 * 4 * 33 + 33  # the device never waits; the last return is bare
    assert found.micro_batches == 2
    assert found.gain == found.seconds[1] / found.seconds[2] > 1.9


def test_ties_go_to_fewer() -> None:
    free = LayerCosts(attend=cost(0, 1), send=cost(0, 0), experts=cost(0, 1), collect=cost(0, 0))
    assert choose_split(free, 64).micro_batches == 1
    cheap = dataclasses.replace(free, send=cost(0, 0.005), collect=cost(0, 0.005))
    found = choose_split(cheap, 64)
    assert found.micro_batches == 1
    assert found.gain == 1


def test_weights_read_twice_are_not_worth_a_small_exchange() -> None:
    costs = LayerCosts(attend=cost(10, 1), send=cost(1, 0.1), experts=cost(100, 1), collect=cost(1, 0.1))
    assert choose_split(costs, 16, layers=4).micro_batches == 1
    assert choose_split(costs, 16_000, layers=4).micro_batches > 1


def test_counts() -> None:
    costs = LayerCosts(attend=cost(0, 1), send=cost(0, 1), experts=cost(0, 1), collect=cost(0, 1))
    assert list(choose_split(costs, 3, counts=(4, 2)).seconds) == [1, 2]
    text = str(choose_split(costs, 2, counts=(2,)))
    assert text == "2 rows in 2 micro-batches (predicted for 1 layers, 1: 8000 ms, 2: 5000 ms)"


@given(st.floats(0, 1), st.floats(1e-9, 1), st.sets(st.integers(1, 1000), min_size=2, max_size=5))
def test_fits_meet_what_is_linear(fixed: float, per_row: float, sizes: set[int]) -> None:
    found = LinearCost.fit({size: fixed + per_row * size for size in sizes})
    for size in sizes:
        assert found.seconds(size) == pytest.approx(fixed + per_row * size, rel=1e-6)


def test_fits_have_no_negative_part() -> None:
    assert LinearCost.fit({1: 1.0, 10: 20.0}).fixed == 0
    assert LinearCost.fit({1: 2.0, 10: 1.0}).per_row == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: LinearCost.fit({8: 1.0}), "measured at 1 sizes: give two or more"),
        (lambda: LinearCost.fit({8: 1.0, 16: 0.0}), "16 rows in 0.0 s"),
        (lambda: LinearCost.fit({0: 1.0, 16: 1.0}), "0 rows in 1.0 s"),
        (lambda: cost(-1, 0), "fixed -1 s"),
        (lambda: cost(0, float("nan")), "per_row nan s"),
        (lambda: choose_split(LayerCosts(**dict.fromkeys(PARTS, cost(0, 0))), 0), "0 rows in 1 layers"),
        (lambda: choose_split(LayerCosts(**dict.fromkeys(PARTS, cost(0, 0))), 4, counts=(0,)), r"cut into \(0,\)"),
    ],
)
def test_what_cannot_be(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrong()
