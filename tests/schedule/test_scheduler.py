"""The scheduler over links and predictors that misbehave: every layer gets its experts, and no slot is lost."""

import dataclasses
import re
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.memory.residency import Residency
from ef_jax.predict import History, Oracle
from ef_jax.replay.simulated_link import FreeLink, SimulatedLink
from ef_jax.replay.simulator import simulate
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.prefetch import CANDIDATES
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.stats import Stats
from tests.replay.traces import made_up

LAYERS, EXPERTS, TOP_K = 3, 8, 2


class FailingLink(SimulatedLink):
    """Of the prefetches that come across, some have failed."""

    def __init__(self, clock: VirtualClock, fails: list[bool]) -> None:
        super().__init__(LinkModel(bandwidth=1.0, in_flight=2), clock, block_bytes=1)
        self._fails, self._lost = deque(fails), []
        self.prefetches_failed = 0

    def _sort(self, keys):
        kept = []
        for key in keys:
            if self._fails and self._fails.popleft():
                self._lost.append(key)
                self.prefetches_failed += 1
            else:
                kept.append(key)
        return kept

    def arrived(self):
        return self._sort(super().arrived())

    def wait(self, keys):
        super().wait(keys)
        self._sort(keys)

    def failed(self):
        lost, self._lost = self._lost, []
        return lost


class Random:
    """A predictor that says anything, and may break down at a call."""

    def __init__(self, seed: int, breaks_at: int | None, how: str) -> None:
        self._random = np.random.default_rng(seed)
        self._left, self._how = breaks_at, how

    def _call(self):
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                if self._how == "raises":
                    raise KeyError("lost")
                return self._how
        return None

    def on_step(self, tokens):
        self._call()

    def on_paths(self, bins, following=None):
        self._call()

    def on_ahead(self, layer, bins):
        self._call()

    def on_route(self, layer, rows):
        self._call()

    def ahead(self, layer, horizon):
        how = self._call()
        scores = self._random.random((horizon, EXPERTS), np.float32)
        if how == "nan":
            scores[0, 0] = np.nan
        return scores[:, :-1] if how == "shape" else scores

    def step_scores(self):
        scores = self._random.random((LAYERS, EXPERTS), np.float32)
        return scores * np.nan if self._call() == "nan" else scores


def make(link, clock, predictor, *, slots=8, policy="lru", prefetch="auto", candidates="value", most_wasted=1.0):
    residency = Residency(
        layers=LAYERS,
        experts=EXPERTS,
        cache_slots=slots,
        staging_slots=TOP_K * 2,
        policy=make_policy(policy, layers=LAYERS, experts=EXPERTS, cache_slots=slots),
    )
    stats = Stats.empty(layers=LAYERS, experts=LAYERS * EXPERTS, slots=slots, staging_slots=TOP_K * 2)
    return Scheduler(
        residency,
        link,
        stats,
        block_bytes=1,
        wave_size=4,
        predictor=predictor,
        prefetch=prefetch,
        candidates=candidates,
        most_wasted=most_wasted,
        trial=False,
        now=lambda: clock.now,
    )


@given(data=st.data())
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_every_layer_gets_its_experts_and_no_slot_is_lost(candidates, data) -> None:
    """Whatever the policy, the cache, the horizon, the predictor and the failures of prefetches."""
    clock = VirtualClock()
    link = FailingLink(clock, data.draw(st.lists(st.booleans(), max_size=20)))
    breaks = data.draw(st.none() | st.integers(0, 40))
    predictor = Random(data.draw(st.integers(0, 99)), breaks, data.draw(st.sampled_from(["raises", "nan", "shape"])))
    slots = data.draw(st.integers(0, LAYERS * EXPERTS - 1))
    scheduler = make(
        link,
        clock,
        predictor,
        slots=slots,
        policy=data.draw(st.sampled_from(list(POLICIES))),
        prefetch=data.draw(st.sampled_from(["auto", 1, 3])),
        candidates=candidates,
        most_wasted=data.draw(st.sampled_from([1.0, 0.1])),
    )
    residency = scheduler.residency
    row = st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
    bins = np.zeros((3, EXPERTS), np.uint8) if data.draw(st.booleans()) else None
    paths = np.zeros((LAYERS, EXPERTS), np.uint8) if data.draw(st.booleans()) else None
    for number in range(data.draw(st.integers(1, 6))):
        scheduler.begin_step([number], bins, paths=paths)
        for layer in range(LAYERS):
            rows = data.draw(st.lists(row, min_size=1, max_size=2))
            needed = {expert for each in rows for expert in each}
            admission = scheduler.ask(layer, rows, bins)
            assert len(residency.in_flight) <= slots
            scheduler.complete(admission)
            where = residency.slot_row(layer, admission)
            assert len({int(where[expert]) for expert in needed} - {-1}) == len(needed)
            assert all(residency.slot_of[layer, expert] >= 0 for expert in admission.late)
            clock.advance(data.draw(st.sampled_from([0.0, 0.7, 5.0])))
            held = [key for key in residency.key_of if key is not None]
            assert len(held) + residency.free == slots
            assert len(held) == len(set(held)) == sum(residency.count)
    for wave in scheduler.serve_prompt(0, np.ones(EXPERTS, np.int64)):
        assert wave.slot_row.max() >= 0
    assert residency.in_flight == []
    scheduler.end_run()
    decode = scheduler.stats.decode
    assert decode.bytes_wasted <= decode.bytes_prefetch == link.prefetches_begun


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "the predictor Random failed, KeyError: 'lost'"),
        ("nan", "the predictor Random failed, its probabilities are not numbers"),
        ("shape", r"its probabilities are of shape \(3, 7\), not \(3, 8\)"),
    ],
)
def test_a_predictor_that_fails_ends_prefetching_and_says_why(how, message) -> None:
    clock = VirtualClock()
    link = SimulatedLink(LinkModel(bandwidth=1.0), clock, block_bytes=1)
    scheduler = make(link, clock, Random(0, 20, how))
    for number in range(20):
        if number == 10:
            begun = link.prefetches_begun
            assert begun > 0
        scheduler.begin_step([0])
        for layer in range(LAYERS):
            scheduler.serve(layer, [[number % 8, (number + layer + 1) % 8]])
            clock.advance(3.0)
    scheduler.end_run()
    assert link.prefetches_begun == begun
    assert re.search(message, scheduler.stats.horizon["off_because"])


def test_a_block_whose_prefetch_fails_while_it_is_waited_for_is_copied_on_demand() -> None:
    clock = VirtualClock()
    link = FailingLink(clock, [True])
    predictor = Oracle([[[[0]], [[4]], [[0]]]], layers=LAYERS, experts=EXPERTS)
    scheduler = make(link, clock, predictor, prefetch=1)
    scheduler.begin_step([0])
    scheduler.serve(0, [[0]])
    clock.advance(0.25)
    admission = scheduler.serve(1, [[4]])
    decode = scheduler.stats.decode
    assert admission.late == [4]
    assert (decode.late_hits[1], decode.misses[1], decode.bytes_demand) == (0, 1, 2)
    assert decode.stall_seconds == 1.0 + 0.75 + 1.0
    assert scheduler.residency.slot_of[1, 4] >= 0
    assert (1, 4) not in scheduler.residency.in_flight


def test_a_layer_that_cannot_miss_is_told_later() -> None:
    clock = VirtualClock()
    scheduler = make(FreeLink(), clock, None, slots=16, prefetch="off")
    scheduler.residency.seed(0, [0])
    assert not scheduler.cannot_miss(0)
    scheduler.residency.clear()
    for layer in (0, 1):
        for expert in range(EXPERTS):
            scheduler.residency.displace(layer, expert, None)
        assert not scheduler.cannot_miss(layer)
        for expert in range(EXPERTS):
            scheduler.residency.arrive(layer, expert)
    assert scheduler.cannot_miss(1)
    assert not scheduler.cannot_miss(2)
    scheduler.begin_step([0])
    scheduler.note(1, [[0, 1], [1, 2]])
    assert scheduler.stats.decode.hits == [0, 3, 0]
    for expert in range(EXPERTS):
        scheduler.residency._evict(1, expert)
    assert sum(scheduler.residency.wasted) == EXPERTS - 3


def test_automatic_prefetching_that_cannot_be_is_off_and_says_so() -> None:
    clock = VirtualClock()
    history = History(layers=LAYERS, experts=EXPERTS)
    assert make(FreeLink(), clock, None).stats.horizon == {"off_because": "it needs a predictor"}
    because = make(FreeLink(), clock, history).stats.horizon["off_because"]
    assert because == "it needs a link that can prefetch, which FreeLink cannot"
    assert make(FreeLink(), clock, None, prefetch="off").stats.horizon is None
    link = SimulatedLink(LinkModel(bandwidth=1.0), clock, block_bytes=1)
    because = make(link, clock, history, policy="static").stats.horizon["off_because"]
    assert because == "the cache policy Static lets nothing leave for a prediction"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefetch": "always"}, """prefetch 'always': give "auto", "off" or a horizon of 0 to 3"""),
        ({"candidates": "best"}, "candidates 'best' is not one of value, threshold, top_k, cumulative"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message) -> None:
    clock = VirtualClock()
    link = SimulatedLink(LinkModel(bandwidth=1.0), clock, block_bytes=1)
    with pytest.raises(InputError, match=message):
        make(link, clock, History(layers=LAYERS, experts=EXPERTS), **settings)


class Liar(Oracle):
    """Names all that will not be used."""

    def ahead(self, layer, horizon):
        return np.where(super().ahead(layer, horizon) > 0, 0, 0.95).astype(np.float32)


@pytest.mark.parametrize("bandwidth", [3e5, 2e6, 3e7])
@pytest.mark.parametrize("slots", [8, 24])
def test_automatic_prefetching_is_no_slower_than_none_even_by_lies(slots, bandwidth) -> None:
    """Two blocks of every layer take a layer's time at 2 MB/s."""
    trace = dataclasses.replace(made_up(length=40), block_bytes=1000)
    times = {}
    for name, predictor in (("off", "none"), ("liar", None), ("oracle", "oracle"), ("history", "history")):
        made = predictor or Liar((step.routes for step in trace.steps(1)), layers=3, experts=16)
        times[name] = simulate(
            trace,
            slots=slots,
            batch=1,
            link=LinkModel(bandwidth=bandwidth),
            compute_seconds=1e-3,
            predictor=made,
            prefetch="off" if name == "off" else "auto",
        ).decode.seconds
    assert times["liar"] <= 1.01 * times["off"]
    assert times["history"] <= 1.01 * times["off"]
    assert times["oracle"] < 0.97 * times["off"] or bandwidth == 3e7
    computing = trace.count * 3 * 1e-3
    assert bandwidth < 1e7 or times["oracle"] < 1.02 * computing


def test_reports_explain_horizons() -> None:
    trace = dataclasses.replace(made_up(length=20), block_bytes=1000)
    settings = {"slots": 12, "batch": 1, "compute_seconds": 1e-3, "predictor": "history"}
    report = simulate(trace, link=LinkModel(bandwidth=5e5), prefetch="auto", **settings).horizon
    assert report["off_because"] is None
    assert report["layer_seconds"] == pytest.approx(1e-3)
    assert report["block_seconds"] == pytest.approx(2e-3)
    assert len(report["layers"]) == 3
    assert "blocks of 2 ms to hide behind layers of 1 ms" in report["layers"][1]["reason"]
    assert len(report["mean_by_step"]) == trace.count
    slow = simulate(trace, link=LinkModel(bandwidth=1e3), prefetch="auto", **settings).horizon
    assert slow["mean"] == 0
    assert "demand copies leave" in slow["layers"][0]["reason"]
    fixed = simulate(trace, link=LinkModel(bandwidth=1e6), prefetch=2, **settings).horizon
    assert [layer["horizon"] for layer in fixed["layers"]] == [2, 2, 2]
