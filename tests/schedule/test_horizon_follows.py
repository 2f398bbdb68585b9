"""Horizons follow the link, and counters of stalls and over-fetches move them by a little."""

import pytest

from ef_jax.schedule.horizon import Horizons
from ef_jax.schedule.need import make_need
from ef_jax.schedule.pace import LinkPace
from ef_jax.schedule.trust import Trust

LAYERS = 8


class Rig:
    """Horizons of layers that fetch two blocks a step each."""

    def __init__(self) -> None:
        self.horizons = Horizons(layers=LAYERS, need=make_need("mean", layers=LAYERS))
        self._trust = Trust(layers=LAYERS, distances=LAYERS)

    def step(self, block_seconds: float, *, waited: int = 0, wasted: int = 0) -> float:
        """One step of layers that compute for a second; the mean horizon."""
        pace = LinkPace(block_seconds=block_seconds, layer_seconds=1.0, idle_share=0.5)
        self.horizons.begin_step(1, None, pace, self._trust)
        for layer in range(LAYERS):
            self.horizons.need.fetched(layer, 2)
            self.horizons.served(layer, waited, full=True, wasted=wasted)
        return self.horizons.mean


def test_the_formula_is_followed_at_once() -> None:
    rig = Rig()
    levels = []
    for block_seconds in (0.6, 2.4, 0.6):
        means = [rig.step(block_seconds) for _ in range(20)]
        assert means[2:] == [means[-1]] * 18
        levels.append(means[-1])
    assert levels == [2, 5, 2]


@pytest.mark.parametrize(("counted", "level"), [({"waited": 3}, 4), ({"wasted": 6}, 1)])
def test_counters_move_a_horizon_by_two_layers_at_most_and_only_until_the_formula_moves(
    counted: dict[str, int], level: int
) -> None:
    rig = Rig()
    for _ in range(100):
        rig.step(0.6, **counted)
    assert rig.step(0.6) == level
    rig.step(2.4)
    assert rig.step(2.4) == 5
    rig.step(0.6)
    assert rig.step(0.6) == 2
