"""Prefetching decode steps on the simulated link: what is fetched when, and what it is counted as.

One block takes one second, and there is one sequence.
"""

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.memory.policies import Policy, make_policy
from ef_jax.memory.residency import Residency
from ef_jax.predict import History, Oracle
from ef_jax.replay.simulated_link import FreeLink, SimulatedLink
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.stats import Stats

EXPERTS = 8


class Told:
    """A predictor that says what it is told, by layer."""

    def __init__(self, layers: int) -> None:
        self.scores = np.zeros((layers, EXPERTS), np.float32)
        self.heard: list = []

    def on_step(self, tokens):
        self.heard.append(("step", tokens))

    def on_paths(self, bins, following=None):
        self.heard.append(("paths", bins))

    def on_ahead(self, layer, bins):
        self.heard.append((layer, "ahead"))

    def on_route(self, layer, rows):
        self.heard.append((layer, rows))

    def ahead(self, layer, horizon):
        return self.scores[np.arange(layer + 1, layer + 1 + horizon) % len(self.scores)]

    def step_scores(self):
        return self.scores


class Rig:
    """A scheduler with its parts; `serve` runs one layer and lets it compute."""

    def __init__(self, *, layers: int = 3, slots: int = 12, horizon=1, compute: float = 2.5, candidates="value"):
        self.clock, self.predictor, self.compute = VirtualClock(), Told(layers), compute
        self.link = SimulatedLink(LinkModel(bandwidth=1.0), self.clock, block_bytes=1)
        self.stats = Stats.empty(layers=layers, experts=layers * EXPERTS, slots=slots, staging_slots=4)
        self.residency = Residency(
            layers=layers,
            experts=EXPERTS,
            cache_slots=slots,
            staging_slots=4,
            policy=make_policy("lru", layers=layers, experts=EXPERTS, cache_slots=slots),
        )
        self.scheduler = Scheduler(
            self.residency,
            self.link,
            self.stats,
            block_bytes=1,
            wave_size=4,
            predictor=self.predictor,
            prefetch=horizon,
            candidates=candidates,
        )
        self.scheduler.begin_step([0])

    def say(self, layer: int, *experts: int, probability: float = 0.9) -> None:
        self.predictor.scores[layer] = 0
        self.predictor.scores[layer, list(experts)] = probability

    def serve(self, layer: int, *experts: int):
        admission = self.scheduler.serve(layer, [list(experts)])
        self.clock.advance(self.compute)
        return admission

    @property
    def decode(self):
        return self.stats.decode


def test_a_right_prediction_is_a_hit_without_a_stall():
    rig = Rig(compute=2.5)
    rig.say(1, 4)
    rig.serve(0, 0)
    assert rig.decode.stall_seconds == 1.0  # layer 0 was not predicted
    admission = rig.serve(1, 4)
    assert (admission.hits, admission.late, admission.missing) == (1, [], [])
    assert (rig.decode.stall_seconds, rig.decode.bytes_demand, rig.decode.bytes_prefetch) == (1.0, 1, 1)
    assert rig.decode.hits[1] == 1
    assert rig.predictor.heard == [("step", [0]), (0, [[0]]), (1, [[4]])]


def test_paths_are_heard_first_and_the_step_begins_with_a_plan():
    """What the first layer is predicted to use is fetched before it asks."""
    rig = Rig(compute=2.5)
    paths = np.zeros((3, EXPERTS), np.uint8)
    rig.say(0, 5)
    rig.scheduler.begin_step([7], paths=paths)
    rig.clock.advance(rig.compute)
    admission = rig.serve(0, 5)
    assert (admission.hits, admission.late, admission.missing) == (1, [], [])
    assert rig.decode.stall_seconds == 0.0
    assert [event[0] for event in rig.predictor.heard] == ["step", "step", "paths", 0]
    assert rig.predictor.heard[2][1] is paths


def test_a_late_hit_waits_for_the_rest_of_the_copy_only():
    rig = Rig(compute=0.75)
    rig.say(1, 4)
    rig.serve(0, 0)
    assert rig.serve(1, 4).late == [4]
    assert rig.decode.stall_seconds == 1.0 + 0.25
    assert (rig.decode.late_hits, rig.decode.misses) == ([0, 1, 0], [1, 0, 0])
    assert (rig.decode.bytes_prefetch, rig.decode.bytes_demand, rig.decode.bytes_wasted) == (1, 1, 0)


def test_demand_overtakes_the_queue_and_waits_for_one_block():
    rig = Rig(compute=1.5, slots=24)
    for _ in range(20):  # the link learns that there is time for two blocks
        rig.serve(0, 0)
    rig.say(1, 4, 5)
    rig.serve(0, 0)  # 4 is across after 1 s, 5 is under way when layer 1 asks for 6
    spent = rig.decode.stall_seconds
    admission = rig.serve(1, 4, 6)
    assert (admission.hits, admission.missing) == (1, [6])
    assert rig.decode.stall_seconds - spent == 0.5 + 1.0


def test_the_plan_is_no_longer_than_the_spare_window():
    rig = Rig(compute=1.5, horizon=3, slots=24)
    for _ in range(40):
        rig.serve(0, 0)
    for layer in (1, 2):
        rig.say(layer, 3, 4, 5)
    rig.serve(0, 0)
    assert len(rig.residency.in_flight) == 2
    assert {layer for layer, _ in rig.residency.in_flight} == {1}  # the nearer layer first


def test_likelier_experts_go_first_and_unlikely_ones_are_left():
    rig = Rig(compute=1.5, candidates="threshold")
    rig.say(1, 2, probability=0.6)
    rig.predictor.scores[1, 5] = 0.8
    rig.predictor.scores[1, 6] = 0.4
    rig.serve(0, 0)
    assert rig.residency.in_flight == [(1, 5)]  # before anything is measured there is time for one block
    for _ in range(10):
        rig.serve(0, 0)
    assert set(rig.residency.key_of) == {None, (0, 0), (1, 5), (1, 2)}


def test_a_prefetch_that_has_not_begun_is_dropped_and_its_slot_serves_the_miss():
    rig = Rig(compute=0.5, slots=3, layers=3)
    rig.link.start(2, [0, 1, 2, 3])  # the link is busy for four seconds
    rig.say(1, 4)
    rig.link._meter.layer_seconds = 100.0
    rig.scheduler.serve(0, [[]])
    assert rig.residency.in_flight == [(1, 4)]
    slot = rig.residency.key_of.index((1, 4))
    rig.clock.advance(0.5)
    assert rig.serve(1, 6).missing_slots == [slot]
    assert rig.residency.in_flight == []
    assert rig.link.prefetches_begun == rig.decode.bytes_prefetch == rig.decode.bytes_wasted == 0


def test_what_left_unused_is_counted_as_wasted():
    rig = Rig(slots=3)
    rig.serve(2, 0)
    rig.say(1, 4)
    rig.serve(0, 0)
    rig.say(1)
    rig.serve(1, 5)  # one slot a layer: 4 leaves
    rig.serve(2, 0)
    assert (rig.decode.bytes_prefetch, rig.decode.bytes_wasted) == (1, 1)


def test_the_running_layer_and_nearer_ones_lose_nothing():
    """One list of slots for all layers: only the layer that is furthest from being used may lose one."""
    rig = Rig(slots=3, layers=3, horizon=2, compute=9.0, candidates="threshold")
    rig.residency.floors[:] = [0, 0, 0]
    rig.scheduler.serve(2, [[0]])
    rig.clock.advance(9.0)
    rig.scheduler.serve(0, [[0]])
    rig.clock.advance(9.0)
    rig.scheduler.serve(1, [[0]])
    rig.clock.advance(9.0)
    rig.say(1, 5)
    rig.scheduler.serve(0, [[0]])
    keys = set(rig.residency.key_of)
    assert keys >= {(0, 0), (1, 5)}
    assert len(keys) == 3


def test_predicted_experts_do_not_push_one_another_out():
    rig = Rig(slots=3, compute=9.0, candidates="threshold")
    rig.serve(2, 0)
    rig.say(1, 1, 2, 3, 4)
    for _ in range(5):
        rig.serve(0, 0)
    assert set(rig.residency.key_of) == {(0, 0), (1, 1), (2, 0)}  # one slot a layer
    assert rig.link.prefetches_begun == 1


def test_a_prompt_finds_nothing_in_flight():
    rig = Rig(compute=0.5)
    rig.say(1, 4)
    rig.serve(0, 0)
    assert rig.residency.in_flight == [(1, 4)]
    began = rig.stats.decode.stall_seconds
    for wave in rig.scheduler.serve_prompt(1, np.bincount([4, 5], minlength=EXPERTS)):
        assert wave.slot_row.max() >= 0
    assert rig.residency.in_flight == []
    assert (rig.stats.prefill.hits[1], rig.stats.prefill.misses[1]) == (1, 1)
    assert rig.stats.prefill.stall_seconds == 0.5 + 1.0
    assert rig.stats.decode.stall_seconds == began


def test_a_policy_that_wants_predictions_hears_them_once_a_step():
    heard = []

    class Wants(Policy):
        wants_predictions = True

        def on_predict(self, scores):
            heard.append(scores)

        def victims(self, layer, missing, needed, spare):
            return [None] * len(missing)

    rig = Rig(horizon=0)
    rig.residency.policy = Wants(layers=3, experts=EXPERTS, cache_slots=12)
    rig.scheduler.begin_step([1])
    rig.serve(0, 0)
    assert len(heard) == 1
    assert heard[0] is rig.predictor.scores
    assert rig.residency.in_flight == []


@pytest.mark.parametrize(
    ("predictor", "horizon", "message"),
    [
        (None, 2, "prefetch 2 needs a predictor"),
        (History(layers=3, experts=EXPERTS), 4, "prefetch 4: give .* 0 to 3, the number of MoE layers"),
        (History(layers=3, experts=EXPERTS), -1, "prefetch -1"),
        (Oracle([], layers=3, experts=EXPERTS), 1, "needs a link that can prefetch, which FreeLink cannot"),
    ],
)
def test_impossible_horizons_are_refused(predictor, horizon, message):
    rig = Rig(horizon=0)
    with pytest.raises(InputError, match=message):
        Scheduler(
            rig.residency,
            FreeLink(),
            rig.stats,
            block_bytes=1,
            wave_size=4,
            predictor=predictor,
            prefetch=horizon,
        )
