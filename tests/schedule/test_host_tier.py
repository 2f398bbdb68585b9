"""A host pool that does not hold every block: the right ones come, within its memory, whatever the disk does."""

import threading
import time

import jax
import numpy as np
import pytest

from ef_jax.errors import CheckpointError, LinkError
from ef_jax.memory.host_plan import THREADS, HostPlan
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.predict import History
from ef_jax.schedule.async_link import AsyncLink
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.disk_link import DiskLink
from ef_jax.schedule.host_tier import HostTier
from ef_jax.schedule.pace import LinkPace
from ef_jax.weights.block_reader import BlockReader, read_bytes
from tests.schedule.tiny_store import EXPERTS, LAYERS, SPEC, mark, marks

PLAN = HostPlan(places=8, passing=4 + THREADS, wave=4, place_bytes=read_bytes(SPEC))
KEYS = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
A, B, C = (0, 1), (1, 2), (2, 0)


class Disk(BlockReader):
    """Reads made-up blocks; can be held up, and can fail for some keys."""

    buffer_bytes = read_bytes(SPEC)

    def __init__(self) -> None:
        self.open, self.broken, self.read_keys = threading.Event(), set(), []
        self.open.set()

    def read(self, layer, expert, buffer):
        self.read_keys.append((layer, expert))
        self.open.wait()
        if (layer, expert) in self.broken:
            raise CheckpointError("'00001' is truncated: it ends at byte 4096")
        block = buffer[: SPEC.block_bytes]
        block.view(np.uint16)[:] = mark(layer, expert)
        return block


def table(slots: int) -> Residency:
    shape = {"layers": LAYERS, "experts": EXPERTS}
    return Residency(
        **shape, cache_slots=slots, staging_slots=EXPERTS, policy=make_policy("lru", **shape, cache_slots=slots)
    )


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.open.set()


@pytest.fixture
def tier(disk):
    link = DiskLink(SPEC, disk, jax.devices()[0], plan=PLAN, timeout=60.0)
    return HostTier(link, table(PLAN.places), block_bytes=SPEC.block_bytes, passing=PLAN.passing)


def is_of(block: jax.Array, key: tuple[int, int]) -> bool:
    return block.shape == SPEC.block_shape and bool((np.asarray(block) == mark(*key)).all())


def test_every_block_comes_over_and_over_within_the_memory_of_the_plan(tier):
    rng = np.random.default_rng(0)
    for _ in range(60):
        tier.gate()
        layer = int(rng.integers(LAYERS))
        keys = [(layer, int(expert)) for expert in rng.choice(EXPERTS, 4, replace=False)]
        tier.request(keys)
        assert all(is_of(tier.block(*key), key) for key in keys)
    stats = tier.stats
    assert stats.hits + stats.misses == 60 * 4
    assert stats.bytes_read == tier.disk.bytes_moved == stats.misses * SPEC.block_bytes > 0
    assert sum(block is not None for block in tier.disk.places) <= PLAN.places < len(KEYS)
    assert stats.buffers_made == tier.disk.buffers.made == 0


def test_a_demand_goes_before_reads_ahead_and_these_can_be_withdrawn(tier, disk):
    disk.open.clear()
    ahead = [(2, expert) for expert in range(THREADS + 2)]
    for key in ahead:
        tier.disk.prefetch([key], [tier.residency.displace(*key, None)])
    while len(disk.read_keys) < THREADS:
        time.sleep(0.001)
    tier.request([A])
    assert tier.disk.withdraw() == ahead[THREADS:]
    disk.open.set()
    assert is_of(tier.block(*A), A)
    assert disk.read_keys[THREADS:] == [A]


def test_what_was_read_ahead_is_there_or_late_and_is_not_read_twice(tier, disk):
    device = table(4)
    tier.listen(History(layers=LAYERS, experts=EXPERTS), device)
    disk.open.clear()
    for key in (A, B):
        tier.disk.prefetch([key], [tier.residency.displace(*key, None)])
    assert not tier.request([A])
    disk.open.set()
    assert is_of(tier.block(*A), A)
    tier.disk.take(tier.disk._flight[B][0])
    tier.gate()
    assert tier.request([B])
    assert is_of(tier.block(*B), B)
    assert sorted(disk.read_keys) == [A, B]
    assert (tier.stats.late_hits, tier.stats.hits, tier.stats.misses) == (1, 1, 0)
    assert tier.stats.bytes_ahead == 2 * SPEC.block_bytes


def test_predictions_of_what_the_device_has_are_not_read(tier, disk, monkeypatch):
    monkeypatch.setattr(DiskLink, "pace", LinkPace(1e-3, 2e-3, 0.5))
    monkeypatch.setattr(tier.disk, "window", lambda: 2)
    device, predictor = table(4), History(layers=LAYERS, experts=EXPERTS)
    device.admit(*_row(B))
    tier.listen(predictor, device)
    for _ in range(30):
        predictor.on_step([0])
        tier.begin_step([0], None, listens=True)
        for key in (A, B, C):
            tier.gate()
            predictor.on_route(*_row(key))
            if key != B:
                tier.request([key])
                tier.block(*key)
            if key == C:  # nothing stays, so it has to be read again
                for lost in np.argwhere(tier.residency.slot_of >= 0).tolist():
                    tier.residency.drop(*lost)
            tier.plan(key[0])
            for read, _ in tier.disk._flight.values():  # as if the layer computed for that long
                tier.disk.take(read)
    tier.end_run()
    assert tier.stats.bytes_ahead > 0
    assert A in disk.read_keys
    assert B not in disk.read_keys


def test_a_prompt_streams_through_and_costs_the_pool_nothing(tier, disk):
    tier.request([A])
    tier.block(*A)
    tier.gate()
    experts = list(range(EXPERTS))
    disk.open.clear()
    tier.prompt(0, experts)
    assert len(disk.read_keys) <= 1 + THREADS
    disk.open.set()
    for first in range(0, EXPERTS, 4):
        wave = [(0, expert) for expert in experts[first : first + 4]]
        tier.request(wave)
        assert len(tier._coming) <= PLAN.passing
        assert all(is_of(tier.block(*key), key) for key in wave)
    tier.end_prompt(0, np.ones(EXPERTS, np.int64))
    assert tier.request([A])
    assert sorted(disk.read_keys) == [(0, expert) for expert in experts]
    assert tier.stats.misses == EXPERTS  # the first of them A's, before the prompt
    assert tier.disk.buffers.made == 0


def test_a_read_that_fails_is_one_clear_error_and_can_be_tried_again(tier, disk):
    disk.broken = {A}
    tier.request([A, (0, 2)])
    with pytest.raises(LinkError, match=r"^expert 1 of MoE layer 0 cannot be read: '00001' is truncated: .* 4096$"):
        tier.block(*A)
    tier.abandon()
    assert not tier._coming
    disk.broken = set()
    tier.request([A])
    assert is_of(tier.block(*A), A)


def test_a_disk_that_does_not_answer_is_given_up_and_what_comes_late_is_dropped(tier, disk):
    disk.open.clear()
    tier.disk._timeout = 0.01
    tier.request([A])
    with pytest.raises(LinkError, match=r"^expert 1 of MoE layer 0 cannot be read: nothing has come for 0\.01 s$"):
        tier.block(*A)
    tier.abandon()
    tier.disk._timeout = 60.0
    disk.open.set()
    for key in (B, A):
        assert is_of(tier.block(*key), key)


@pytest.mark.parametrize("kind", [DeviceLink, AsyncLink])
def test_links_take_blocks_that_are_not_in_host_memory(tier, kind):
    link = kind(SPEC, tier, jax.devices()[0], slots=6)
    began = tier.stats.misses
    for layer in range(LAYERS):
        experts = [3 + layer, 9]
        link.finish(link.start(layer, experts), [2 * layer, 2 * layer + 1])
    assert marks(link.pool) == [mark(layer, expert) for layer in range(LAYERS) for expert in (3 + layer, 9)]
    assert tier.stats.misses + tier.stats.hits >= began + 2 * LAYERS


def _row(key):
    return key[0], [[key[1]]]
