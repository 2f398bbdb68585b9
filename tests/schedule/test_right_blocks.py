"""Whatever is predicted, and whatever goes wrong with prefetches: a layer computes from the blocks of its experts."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from ef_jax.errors import LinkError
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.predict import History
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.stats import Stats
from tests.schedule.tiny_store import EXPERTS, LAYERS, SPEC, empty, mark, marks, tiny_store

CACHE, STAGING = 14, 4
MODELS = [LinkModel(bandwidth=SPEC.block_bytes / seconds) for seconds in (0.05, 0.5, 3.0)]


class Unreliable(EmulatedLink):
    """Every third call that copies prefetched blocks raises."""

    def _land(self, keys):
        self._link.refuse = True
        try:
            return super()._land(keys)
        finally:
            self._link.refuse = False


class Refusing(DeviceLink):
    """Raises when it is told to, one call in three or always."""

    refuse = broken = False
    count = 0

    def fetch(self, keys):
        self.count += 1
        if self.broken or (self.refuse and self.count % 3 == 0):
            raise LinkError("not this time")
        return super().fetch(keys)


@pytest.fixture(scope="module")
def device():
    return Refusing(SPEC, tiny_store(), jax.devices()[0], slots=CACHE + STAGING)


class Rig:
    """A scheduler that predicts by history, over an emulated link on a virtual clock."""

    def __init__(self, device: DeviceLink, kind: type[EmulatedLink] = EmulatedLink, prefetch: int | str = 2) -> None:
        empty(device.pool)
        self.rng, self.clock = np.random.default_rng(3), VirtualClock()
        self.link = kind(device, MODELS[1], clock=self.clock)
        self.residency = Residency(
            layers=LAYERS,
            experts=EXPERTS,
            cache_slots=CACHE,
            staging_slots=STAGING,
            policy=make_policy("lru", layers=LAYERS, experts=EXPERTS, cache_slots=CACHE),
        )
        self.stats = Stats.empty(layers=LAYERS, experts=LAYERS * EXPERTS, slots=CACHE, staging_slots=STAGING)
        self.scheduler = Scheduler(
            self.residency,
            self.link,
            self.stats,
            block_bytes=SPEC.block_bytes,
            wave_size=4,
            predictor=History(layers=LAYERS, experts=EXPERTS),
            prefetch=prefetch,
            now=lambda: self.clock.now,
        )
        self.likely = self.rng.permutation(EXPERTS)[:6]

    def step(self) -> None:
        """A step of two sequences, each of whose layers must find its blocks."""
        self.scheduler.begin_step([0, 1])
        for layer in range(LAYERS):
            among = [self.likely if self.rng.random() < 0.8 else EXPERTS for _ in range(2)]
            self.serve(layer, [self.rng.choice(experts, 2, replace=False).tolist() for experts in among])

    def serve(self, layer: int, rows: list[list[int]]) -> None:
        """One layer of a step."""
        admission = self.scheduler.serve(layer, rows)
        slots, held = self.residency.slot_row(layer, admission), marks(self.link.pool)
        for expert in {expert for row in rows for expert in row}:
            assert held[slots[expert]] == mark(layer, expert)
        self.clock.advance(0.7)

    def prompt(self, layer: int = 1) -> Iterator[None]:
        """A prompt that goes through ten experts, wave by wave."""
        for wave in self.scheduler.serve_prompt(layer, np.bincount(range(3, 13), minlength=EXPERTS)):
            held = marks(self.link.pool)
            assert all(held[slot] == mark(layer, expert) for expert, slot in enumerate(wave.slot_row) if slot >= 0)
            yield


@pytest.mark.parametrize("prefetch", [1, 3, "auto"])
@pytest.mark.parametrize("kind", [EmulatedLink, Unreliable])
def test_every_layer_finds_its_own_blocks(device, kind, prefetch):
    rig = Rig(device, kind, prefetch)
    for step in range(60):
        if step % 10 == 9:
            rig.link.set_model(MODELS[step // 10 % 3])
        rig.step()
        if step == 30:
            assert len(list(rig.prompt())) > 1
    rig.scheduler.end_run()
    assert rig.stats.decode.bytes_demand > 0
    assert rig.link.prefetches_begun > 0
    assert (rig.link.prefetches_failed > 0) == (kind is Unreliable)


@pytest.mark.parametrize("fault", ["start", "finish", "prompt", "interrupt"])
def test_a_run_that_broke_off_leaves_no_wrong_block_behind(device, fault):
    rig = Rig(device)
    for _ in range(10 if fault != "prompt" else 0):  # a prompt's blocks stay where there are free slots
        rig.step()
    rig.link.set_model(MODELS[2])
    absent = np.flatnonzero(rig.residency.slot_of[1] < 0)[:2].tolist()
    rig.scheduler.begin_step([0, 1])
    with pytest.raises((LinkError, KeyboardInterrupt)):
        _break_off(rig, device, fault, absent)
    device.broken, rig.link._timeout = False, 60.0
    rig.scheduler.end_run()
    rig.scheduler.begin_step([0, 1])
    rig.serve(1, [absent])
    for _ in range(10):
        rig.step()
    assert len(list(rig.prompt())) > 1


def _break_off(rig: Rig, device: Refusing, fault: str, absent: list[int]) -> None:
    device.broken = fault in ("start", "prompt")
    if fault == "prompt":
        list(rig.scheduler.serve_prompt(1, np.bincount(absent, minlength=EXPERTS)))
    if fault == "finish":
        rig.link._timeout = 0.1
    admission = rig.scheduler.ask(1, [absent])
    if fault == "interrupt":
        raise KeyboardInterrupt
    rig.scheduler.complete(admission)
