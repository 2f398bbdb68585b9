"""The bound on wasted bytes: its price, what candidates it refuses, and what it comes to in replays."""

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.replay.simulator import simulate
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.waste import WasteBound
from tests.replay.traces import made_up
from tests.schedule.test_by_value import EXPERTS, Rig


def test_without_a_bound_waste_is_free() -> None:
    bound = WasteBound(1.0)
    for _ in range(50):
        bound.end_step(10, 9)
    assert bound.price == 0.0
    assert bound.report() == {"most": 1.0, "share": 0.9, "price": 0.0}


def test_the_price_rises_above_the_bound_and_falls_below_it() -> None:
    bound = WasteBound(0.3)
    prices = [bound.price]
    for wasted in (8, 0):
        for _ in range(200):
            bound.end_step(10, wasted)
        prices.append(bound.price)
    assert prices[1] == 1.0
    assert prices[2] == 0.0


def test_the_price_settles_where_the_share_is_the_bound() -> None:
    """Made-up copies whose wasted share falls with the price."""
    for slope in (0.5, 1.0, 2.0):
        bound = WasteBound(0.3)
        for _ in range(600):
            bound.end_step(100, round(100 * max(0.0, 0.6 - slope * bound.price)))
        assert bound.share == pytest.approx(0.3, abs=0.02)


def test_steps_that_move_nothing_change_nothing() -> None:
    bound = WasteBound(0.3)
    bound.end_step(0, 0)
    assert (bound.price, bound.share) == (0.2, 0.0)


@pytest.mark.parametrize("most", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(most: float) -> None:
    with pytest.raises(InputError, match=r"most_wasted .*: give a share"):
        WasteBound(most)


def test_a_doubtful_block_stays_away_even_from_a_free_slot() -> None:
    rig = Rig()
    rig.values.waste_price = 0.5
    assert rig.choose({(1, 3): 0.9, (1, 4): 0.2}) == [(1, 3)]
    rig.values.waste_price = 0.1
    assert rig.choose({(1, 4): 0.2}) == [(1, 4)]


def test_a_surer_block_of_less_value_takes_the_place_of_a_doubtful_one() -> None:
    """Further ahead a block saves less, and is as little wasted as a near one of the same probability."""
    rig = Rig(slots=2)
    rig.hold(0, *range(2))
    rig.values.waste_price = 0.45
    assert rig.choose({(1, 3): 0.3, (2, 5): 0.99}) == [(2, 5)]
    rig = Rig(slots=2)
    rig.hold(0, *range(2))
    assert set(rig.choose({(1, 3): 0.3, (2, 5): 0.99})) == {(1, 3), (2, 5)}


@pytest.mark.parametrize("skew", [0.5, 1.5])
def test_replays_keep_the_bound_and_most_of_the_hits(skew: float) -> None:
    trace = made_up(sequences=4, length=150, layers=4, experts=16, top_k=2, skew=skew, block_bytes=1)
    settings = {
        "slots": 16,
        "batch": 1,
        "link": LinkModel(bandwidth=2.0),
        "compute_seconds": 1.0,
        "predictor": "history",
    }

    def run(**more):
        phase = simulate(trace, **settings, **more).decode
        return sum(phase.hits), phase.bytes_wasted / (phase.bytes_demand + phase.bytes_prefetch)

    off, free, bound = run(), run(prefetch="auto"), run(prefetch="auto", most_wasted=0.2)
    assert free[1] > 0.3
    assert bound[1] < 0.25
    assert off[0] < bound[0] <= free[0]


def test_a_large_batch_finds_room_besides_what_its_layer_uses() -> None:
    """The cheapest blocks of all are those that the running layer needs, and they keep their slots."""
    rig = Rig(slots=2 * EXPERTS)
    rig.hold(0, *range(EXPERTS))
    rig.hold(3, *range(EXPERTS))
    likely = {(3, expert): 0.1 for expert in range(EXPERTS)} | {(1, expert): 1.0 for expert in range(EXPERTS)}
    chosen = rig.choose(likely, needed=list(range(EXPERTS)), room=EXPERTS)
    assert sorted(chosen) == [(1, expert) for expert in range(EXPERTS)]
    assert np.all(rig.residency.slot_of[0] >= 0)
