"""Candidates by value: what is fetched, and what leaves for it."""

import numpy as np
import pytest

from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.schedule.by_value import ByValue
from ef_jax.schedule.pace import LinkPace

LAYERS, EXPERTS = 4, 8
IDLE = LinkPace(block_seconds=0.1, layer_seconds=1.0, idle_share=1.0)
BUSY = LinkPace(block_seconds=1.0, layer_seconds=1.0, idle_share=0.2)


class Rig:
    """A cache full of experts that nobody uses, and a plan at a time."""

    def __init__(self, *, slots: int = 8, policy: str = "lru", longest: int = 3) -> None:
        self.residency = Residency(
            layers=LAYERS,
            experts=EXPERTS,
            cache_slots=slots,
            staging_slots=4,
            policy=make_policy(policy, layers=LAYERS, experts=EXPERTS, cache_slots=slots),
        )
        self.values = ByValue(self.residency, longest=longest)
        self.longest = longest

    def hold(self, layer: int, *experts: int) -> None:
        for expert in experts:
            self.residency.displace(layer, expert, None)
            self.residency.arrive(layer, expert, used=True)

    def choose(self, ahead: dict, *, layer: int = 0, needed=(), room: int = 4, pace: LinkPace = IDLE, reach=None):
        """Plan after `layer` with probabilities `{(layer, expert): p}`; what was chosen, in order."""
        scores = np.zeros((LAYERS, EXPERTS), np.float32)
        for (target, expert), probability in ahead.items():
            scores[(target - layer - 1) % LAYERS, expert] = probability
        self.values.begin_step()
        reach = [self.longest] * LAYERS if reach is None else reach
        keys, slots = self.values.choose(layer, needed, scores, reach, room, pace, [1.0] * self.longest)
        assert [self.residency.key_of[slot] for slot in slots] == keys
        assert self.residency.in_flight[-len(keys) :] == keys or not keys or set(self.residency.in_flight) >= set(keys)
        return keys


def test_free_slots_take_whatever_may_be_used_the_nearest_and_likeliest_first() -> None:
    rig = Rig()
    wanted = {(2, 5): 0.9, (1, 3): 0.01, (1, 4): 0.3, (3, 1): 0.0001}
    assert rig.choose(wanted) == [(1, 4), (1, 3), (2, 5)]


def test_what_is_resident_or_under_way_is_not_fetched_again() -> None:
    rig = Rig()
    rig.hold(1, 3)
    assert rig.choose({(1, 3): 0.9, (1, 4): 0.8}) == [(1, 4)]
    assert rig.choose({(1, 3): 0.9, (1, 4): 0.8}) == []


def test_the_block_that_is_worth_least_leaves_whatever_its_layer_and_floor() -> None:
    rig = Rig(slots=4)
    rig.hold(1, 0)
    rig.hold(2, 0)
    rig.hold(3, 0, 1)
    chances = {(1, 0): 0.9, (2, 0): 0.7, (3, 0): 0.8, (3, 1): 0.2}
    assert rig.choose({**chances, (1, 5): 0.6}) == [(1, 5)]
    assert rig.residency.slot_of[3, 1] < 0
    assert rig.residency.count == [0, 2, 1, 1]


def test_nothing_leaves_that_is_worth_more_than_what_comes() -> None:
    rig = Rig(slots=2)
    rig.hold(1, 0, 1)
    assert rig.choose({(1, 0): 0.5, (1, 1): 0.4, (1, 5): 0.3}) == []
    assert rig.choose({(1, 0): 0.5, (1, 1): 0.2, (1, 5): 0.3}) == [(1, 5)]
    assert rig.residency.slot_of[1, 0] >= 0


def test_the_running_layers_experts_stay() -> None:
    rig = Rig(slots=3)
    rig.hold(0, 0, 1, 2)
    assert rig.choose({(1, 4): 0.9, (1, 5): 0.9, (1, 6): 0.9}, needed=[0, 2]) == [(1, 4)]
    assert [rig.residency.slot_of[0, expert] >= 0 for expert in range(3)] == [True, False, True]


def test_a_cache_that_does_not_give_way_lends_free_slots_only() -> None:
    rig = Rig(slots=3, policy="static")
    rig.hold(3, 0, 1)
    assert rig.choose({(1, 4): 0.9, (1, 5): 0.8}) == [(1, 4)]
    assert rig.residency.count == [0, 1, 0, 2]


def test_a_sure_block_further_on_goes_first_only_if_it_would_find_no_place_later() -> None:
    one_by_one = {"room": 1, "pace": BUSY}
    assert Rig().choose({(1, 4): 0.2, (2, 5): 0.9}, **one_by_one) == [(1, 4)]
    rig = Rig()
    assert rig.choose({(1, 4): 0.2, (2, 5): 0.9, (2, 6): 0.9}, **one_by_one)[0][0] == 2
    assert rig.values.full
    assert rig.values.prices[1] == pytest.approx(0.2)


def test_the_price_of_a_full_link_makes_slots_dear() -> None:
    """Behind a full window a block that leaves takes the place of another when it comes back."""
    rig = Rig(slots=1)
    rig.hold(2, 0)
    tempting = {(2, 0): 0.5, (1, 5): 0.45}
    for price, chosen in ((1.0, []), (0.0, [(1, 5)])):
        for layer in range(LAYERS):
            rig.values.prices[layer], rig.values._waited[layer] = price, 0.0
            rig.values._refactor(layer)
        assert rig.choose(tempting) == chosen


def test_a_block_that_would_hold_up_the_next_layers_misses_must_be_worth_it() -> None:
    slow = LinkPace(block_seconds=3.0, layer_seconds=1.0, idle_share=0.5)
    assert Rig().choose({(1, 4): 0.9}, room=1, pace=slow) == [(1, 4)]
    assert Rig().choose({(1, 4): 0.3}, room=1, pace=slow) == []
    rig = Rig()
    for _ in range(200):  # nothing is ever missing, so nothing is held up
        rig.values.served(1, [0], 1, 0, 0)
    assert rig.choose({(1, 4): 0.3}, room=1, pace=slow) == [(1, 4)]


def test_horizons_bound_what_is_looked_at_layer_by_layer() -> None:
    wanted = {(1, 4): 0.9, (2, 5): 0.9, (3, 6): 0.9}
    assert Rig().choose(wanted, reach=[3, 1, 1, 3]) == [(1, 4), (3, 6)]
    assert Rig().choose(wanted, reach=[0] * LAYERS) == []


def test_a_plan_has_no_more_blocks_than_room() -> None:
    everything = {(layer, expert): 0.5 for layer in range(1, LAYERS) for expert in range(EXPERTS)}
    assert len(Rig(slots=32).choose(everything, room=5, pace=LinkPace(0.2, 1.0, 1.0))) == 5


def test_one_expert_in_one_layer() -> None:
    residency = Residency(
        layers=1,
        experts=1,
        cache_slots=1,
        staging_slots=1,
        policy=make_policy("lru", layers=1, experts=1, cache_slots=1),
    )
    values = ByValue(residency, longest=1)
    scores = np.ones((1, 1), np.float32)
    values.begin_step()
    assert values.choose(0, [], scores, [1], 4, IDLE, [1.0]) == ([(0, 0)], [0])
