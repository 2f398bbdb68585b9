"""Prefetching goes on only where it pays by the clock."""

import random

from ef_jax.schedule.trial import Trial


class World:
    """Steps that take so long with prefetching, and so long without."""

    def __init__(self, with_it: float, without: float, noise: float = 0.0) -> None:
        self.now = 0.0
        self.seconds = {True: with_it, False: without}
        self.trial = Trial(lambda: self.now)
        self._random, self._noise = random.Random(0), noise

    def run(self, steps: int, batch: int = 1) -> list[bool]:
        kinds = []
        for _ in range(steps):
            self.trial.begin_step(batch)
            kinds.append(self.trial.on)
            self.now += self.seconds[self.trial.on] * (1 + self._noise * self._random.random())
        return kinds


def test_it_goes_on_where_steps_are_faster_with_it():
    world = World(1.0, 2.0, noise=0.3)
    kinds = world.run(20_000)
    assert kinds.count(False) == 20  # the two rounds of the only trial
    assert (world.trial.held, world.trial.because) == (1, "")
    assert world.trial.report()["prefetching"]


def test_it_goes_off_where_steps_are_slower_with_it_and_says_why():
    world = World(1.1, 1.0, noise=0.02)
    kinds = world.run(20_000)
    assert kinds[:48] == [True] * 48
    assert kinds.count(True) < 0.02 * 20_000  # half of each further trial
    assert "with prefetching" in world.trial.because


def test_no_clear_result_keeps_prefetching_and_is_looked_at_again_at_growing_intervals():
    world = World(1.0, 1.0)
    kinds = world.run(20_000)
    assert 3 <= world.trial.held <= 7
    assert kinds.count(False) == 20 * world.trial.held


def test_a_world_that_changes_is_noticed():
    world = World(1.0, 2.0)
    world.run(500)
    world.seconds = {True: 3.0, False: 2.0}
    kinds = world.run(3000)
    assert not any(kinds[1000:1400])
    world.seconds = {True: 1.0, False: 2.0}
    assert all(world.run(10_000)[-200:])


def test_batches_of_different_sizes_are_not_compared():
    world = World(1.0, 2.0)
    world.run(60)
    for batch in (2, 1, 2, 1):
        world.run(15, batch)
        assert world.trial.held == 0
    world.run(60, 4)
    assert world.trial.held == 1


def test_pauses_do_not_count():
    world = World(1.0, 2.0)
    for _ in range(200):
        world.run(1)
        world.trial.pause()
        world.now += 1000.0
    assert world.trial.held == 0


def test_rest_lasts_until_the_next_trial_is_due():
    world = World(1.1, 1.0)
    world.run(100)
    assert not world.trial.wanted
    rested = 0
    while not world.trial.wanted:
        world.trial.rest()
        rested += 1
    assert 400 < rested <= 512
    world.run(60)
    assert world.trial.held == 2
