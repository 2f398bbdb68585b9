"""Timelines of the simulated link, worked out by hand: a block of 100 bytes at 100 bytes a second takes one second."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.replay.simulated_link import SimulatedLink
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link import Link, PrefetchLink
from ef_jax.schedule.link_model import LinkModel

A, B, C, D = (0, 1), (1, 2), (1, 3), (2, 0)


def make(**model: float) -> tuple[SimulatedLink, VirtualClock]:
    clock = VirtualClock()
    return SimulatedLink(LinkModel(bandwidth=100.0, **model), clock, block_bytes=100), clock


def test_a_call_costs_its_latency_once_and_the_overhead_for_each_block():
    link, clock = make(latency=2.0, block_overhead=0.5)
    link.finish(link.start(0, [1, 2, 3]), [0, 1, 2])
    assert clock.now == link.seconds == link.busy_seconds == 2 + 3 * 1.5
    assert link.bytes_moved == 300
    assert isinstance(link, Link)
    assert isinstance(link, PrefetchLink)


def test_calls_run_one_after_another_and_hide_behind_compute():
    link, clock = make()
    first, second = link.start(0, [1]), link.start(0, [2, 3])
    clock.advance(2.5)
    link.finish(first, [0])
    assert link.seconds == 0.0
    link.finish(second, [1, 2])
    assert (clock.now, link.seconds) == (3.0, 0.5)


def test_a_demand_copy_waits_for_the_block_on_the_wire_and_overtakes_the_others():
    link, clock = make()
    link.prefetch([A, B, C], [0, 1, 2])
    clock.advance(0.5)
    assert link.start(0, [7]) == 2.0  # A ends at 1
    clock.advance(1.5)
    assert link.arrived() == [A]
    clock.advance(0.75)
    assert link.arrived() == []
    clock.advance(0.25)
    assert link.arrived() == [B]
    clock.advance(1.0)
    assert link.arrived() == [C]
    assert (link.prefetches_begun, link.bytes_moved, link.busy_seconds) == (3, 400, 4.0)


def test_several_blocks_a_call_share_the_latency_and_are_not_overtaken():
    link, clock = make(latency=1.0, in_flight=2)
    link.prefetch([A, B, C], [0, 1, 2])
    clock.advance(2.0)
    assert link.arrived() == [A]
    assert link.start(0, [7]) == 3 + 2
    clock.advance(1.0)
    assert link.arrived() == [B]
    assert link.withdraw() == [C]
    clock.advance(9.0)
    assert link.arrived() == []
    assert link.prefetches_begun == 2


def test_what_has_not_begun_can_be_withdrawn_and_what_has_begun_arrives():
    link, clock = make()
    link.prefetch([A, B], [0, 1])
    assert link.withdraw() == [A, B]  # no time has passed, so nothing has begun
    link.prefetch([C, D], [0, 1])
    clock.advance(0.25)
    assert link.withdraw() == [D]
    link.wait([C])
    assert (clock.now, link.seconds) == (1.0, 0.75)
    assert link.arrived() == []  # `wait` has told
    assert link.bytes_moved == 100


def test_a_prefetch_does_not_begin_before_it_was_asked_for():
    link, clock = make()
    clock.advance(5.0)
    link.prefetch([A], [0])
    clock.advance(0.5)
    link.wait([A])
    assert clock.now == 6.0


def test_the_window_is_the_gap_between_layers_less_what_is_under_way():
    link, clock = make()
    for _ in range(60):  # layers that compute for 2.75 s
        link.withdraw()
        link.prefetch([], [])
        clock.advance(2.75)
    assert link.withdraw() == []
    assert link.window() == 3
    link.prefetch([A, B, C, D], [0, 1, 2, 3])
    clock.advance(3.1)
    link.withdraw()
    assert link.window() == 2  # D is under way for another 0.9 s
    link.start(0, [4, 5])  # these end before the layer can compute
    assert link.window() == 3


def test_a_link_of_no_cost_has_room_for_everything():
    link = SimulatedLink(LinkModel(bandwidth=math.inf), VirtualClock(), block_bytes=100)
    assert link.window() > 10**6
    link.finish(link.start(0, range(64)), range(64))
    assert link.seconds == 0.0


events = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.floats(0, 5)),
        st.tuples(st.just("demand"), st.integers(1, 4)),
        st.tuples(st.just("plan"), st.integers(0, 6)),
    ),
    max_size=40,
)


@given(events, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.2]), st.integers(1, 3))
def test_a_demand_copy_waits_for_one_call_at_most_and_the_link_is_never_more_than_busy(
    events, latency, overhead, in_flight
):
    link, clock = make(latency=latency, block_overhead=overhead, in_flight=in_flight)
    queued = withdrawn = arrived = asked = 0
    waited = 0.0
    for kind, value in events:
        if kind == "compute":
            clock.advance(value)
        elif kind == "demand":
            before = clock.now
            link.finish(link.start(0, range(value)), range(value))
            copying = latency + value * (1 + overhead)
            assert copying - 1e-9 <= clock.now - before <= copying + latency + in_flight * (1 + overhead) + 1e-9
            waited += clock.now - before
            asked += value
        else:
            withdrawn += len(link.withdraw())
            arrived += len(link.arrived())
            link.prefetch([(1, queued + i) for i in range(value)], range(value))
            queued += value
        assert -1e-9 <= link.busy_seconds <= clock.now + 1e-9
    withdrawn += len(link.withdraw())
    clock.advance(100.0)
    arrived += len(link.arrived())
    assert arrived + withdrawn == queued
    assert link.prefetches_begun == arrived
    assert link.bytes_moved == 100 * (arrived + asked)
    assert link.seconds == pytest.approx(waited)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"bandwidth": 0.0}, "bandwidth 0.0 bytes/s: give more than 0"),
        ({"bandwidth": math.nan}, "bandwidth nan"),
        ({"bandwidth": 1.0, "latency": -1e-6}, "latency -1e-06 s: give 0 or more"),
        ({"bandwidth": 1.0, "block_overhead": math.inf}, "block_overhead inf s"),
        ({"bandwidth": 1.0, "in_flight": 0}, "in_flight 0: give at least 1 block"),
    ],
)
def test_figures_that_no_link_has_are_refused(figures, message):
    with pytest.raises(InputError, match=message):
        LinkModel(**figures)
