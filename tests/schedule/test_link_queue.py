"""What a link's queue measures, on a clock that stands still unless it is told: a block takes one second."""

import pytest

from ef_jax.errors import InputError
from ef_jax.replay.simulated_link import SimulatedLink
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.link_queue import LinkQueue
from ef_jax.schedule.pace import PaceMeter
from ef_jax.schedule.wall_clock import Clock, WallClock
from ef_jax.timeline import Timeline

A, B, C = (0, 1), (1, 2), (1, 3)


def make(**model: float) -> tuple[LinkQueue, VirtualClock]:
    clock = VirtualClock()
    return LinkQueue(LinkModel(bandwidth=100.0, **model), clock, block_bytes=100), clock


def layer(link: LinkQueue, clock: VirtualClock, *, misses: int = 0, compute: float = 1.0) -> None:
    """One layer of a decode step."""
    link.withdraw()
    ready = link.demand(0, list(range(misses)))
    link.enqueue([])
    link.wait_until(ready)
    clock.advance(compute)


def test_both_clocks_are_clocks():
    assert isinstance(VirtualClock(), Clock)
    assert isinstance(WallClock(), Clock)


def test_the_layers_time_is_measured_without_what_they_wait_for():
    link, clock = make()
    for _ in range(80):
        layer(link, clock, misses=3, compute=2.5)
    assert link.pace.layer_seconds == pytest.approx(2.5, rel=1e-3)


def test_the_idle_share_is_what_demand_copies_leave():
    link, clock = make()
    assert link.pace.idle_share == 1.0
    for _ in range(80):
        layer(link, clock, misses=1, compute=3.0)
    assert link.pace.idle_share == pytest.approx(0.75, rel=1e-3)
    for _ in range(80):
        layer(link, clock, misses=2, compute=0.0)
    assert link.pace.idle_share == pytest.approx(0.0, abs=1e-3)


def test_a_prompts_waves_are_not_taken_for_layers():
    link, clock = make()
    for _ in range(80):
        layer(link, clock, compute=2.0)
    before = link.pace
    link.withdraw()  # the gap up to here was a layer's still
    for _ in range(20):
        link.withdraw()
        link.wait_until(link.demand(0, [1, 2, 3]))
        clock.advance(50.0)
    assert tuple(link.pace) == pytest.approx(tuple(before), rel=1e-3)


def test_block_seconds_count_latency_in_and_follow_a_change_of_the_link():
    link, _ = make(latency=1.0)
    link.wait_until(link.demand(0, [1, 2]))
    assert 1.5 <= link.pace.block_seconds < 2.0  # 3 s for 2 blocks, and a probe's 2 s for one
    link.set_model(LinkModel(bandwidth=25.0))
    assert link.pace.block_seconds < 2.0
    for _ in range(40):
        link.wait_until(link.demand(0, [1]))
    assert link.pace.block_seconds == pytest.approx(4.0, rel=0.02)


def test_nothing_is_known_of_a_copy_before_it_is_across():
    link, clock = make()
    link.set_model(LinkModel(bandwidth=1.0))
    link.demand(0, [1])
    clock.advance(99.0)
    assert link.pace.block_seconds == 1.0
    clock.advance(1.0)
    assert link.pace.block_seconds > 10.0


def test_a_change_of_the_link_spares_the_call_under_way():
    link, clock = make()
    link.enqueue([A, B])
    clock.advance(0.5)
    link.set_model(LinkModel(bandwidth=50.0))
    clock.advance(0.5)
    assert link.arrived() == [A]
    assert link.demand(0, [7]) == 1.0 + 2.0
    clock.advance(9.0)
    assert link.arrived() == [B]
    assert link.busy_seconds == 1.0 + 2.0 + 2.0


def test_a_slow_link_has_no_window_once_that_is_known():
    link, clock = make()
    for _ in range(40):
        layer(link, clock, compute=4.0)
    assert link.window() == 4
    link.set_model(LinkModel(bandwidth=0.1))
    link.withdraw()
    link.enqueue([A])
    clock.advance(1.0)
    assert link.withdraw() == []
    assert link.window() == 0  # A will be under way for another 999 s
    link.wait_until(link.take(A))
    assert link.pace.block_seconds > 100.0
    link.withdraw()
    assert link.window() <= 1


def test_every_copy_is_a_span_of_its_track():
    link, clock = make(latency=0.5, in_flight=2)
    link.timeline = Timeline()
    link.demand(2, [4, 5])
    link.enqueue([A, B, C])
    clock.advance(9.0)
    link.arrived()
    spans = [(span.track, span.begin, span.end, span.args) for span in link.timeline._spans]
    assert spans == [
        ("copies: demand", 0.0, 2.5, {"layer": 2, "experts": [4, 5]}),
        ("copies: prefetch", 2.5, 4.0, {"layer": 0, "expert": 1}),
        ("copies: prefetch", 4.0, 5.0, {"layer": 1, "expert": 2}),
        ("copies: prefetch", 5.0, 6.5, {"layer": 1, "expert": 3}),
    ]


def test_a_meter_takes_nobodys_waiting_for_computing():
    meter = PaceMeter(1.0)
    for now in range(0, 800, 10):
        meter.begin_layer(float(now), served_at=now - 3.0)  # copies took the first 6 of 9 seconds
        meter.end_layer(now + 1.0)
    assert meter.layer_seconds == pytest.approx(3.0, rel=1e-3)


def test_a_hiccup_hardly_moves_the_mean_and_a_change_moves_it_soon():
    meter, now = PaceMeter(1.0), 0.0
    for seconds, layers, expected in ((2.0, 60, 2.0), (500.0, 1, 2.75), (2.0, 60, 2.0), (200.0, 60, 200.0)):
        for _ in range(layers):
            meter.begin_layer(now)
            meter.end_layer(now)
            now += seconds
        meter.begin_layer(now)
        assert meter.layer_seconds == pytest.approx(expected, rel=0.01)


def test_a_model_is_read_from_words():
    assert LinkModel.parse("25GB/s") == LinkModel(bandwidth=25e9)
    assert LinkModel.parse("800 MB/s + 2ms") == LinkModel(bandwidth=8e8, latency=2e-3)
    for words in ("25", "25GB/s+", "25GB/s+fast", "+10us"):
        with pytest.raises(InputError, match="is not a"):
            LinkModel.parse(words)


def test_the_simulated_link_is_the_queue_and_never_fails():
    link = SimulatedLink(LinkModel(bandwidth=100.0), VirtualClock(), block_bytes=100)
    link.prefetch([A], [3])
    link.clock.advance(2.0)
    assert link.arrived() == [A]
    assert link.failed() == []
    assert link.prefetches_failed == 0


def test_wall_clocks_wait_no_less_than_asked():
    clock = WallClock()
    for seconds in (0.0, 5e-5, 1e-3):
        began = clock.now
        assert clock.wait_until(began + seconds) >= 0.0
        assert clock.now >= began + seconds
    assert clock.wait_until(clock.now - 1.0) == 0.0
