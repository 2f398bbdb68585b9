"""Links of a real device, here a CPU: the blocks that were asked for come into the slots that were given."""

import jax
import numpy as np
import pytest

from ef_jax.errors import LinkError
from ef_jax.schedule import async_link, readiness
from ef_jax.schedule.async_link import AsyncLink, blocks_ahead
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.link import Link, PrefetchLink
from ef_jax.timeline import Timeline
from tests.schedule.tiny_store import EXPERTS, LAYERS, SPEC, mark, marks, tiny_store

A, B, C, D = (0, 1), (1, 2), (1, 3), (2, 0)
SLOTS = 12


class Broken(RuntimeError):
    """What a copy that goes wrong raises."""


class Device:
    """Stands between a link and the readiness of its arrays: blocks can be late, held back for good, or broken."""

    def __init__(self, link: AsyncLink) -> None:
        self.link, self.late, self.held, self.broken = link, set(), set(), set()

    def hold(self, *keys) -> None:
        self.held = {id(self.link._flight[key].block) for key in keys}

    def break_(self, *keys) -> None:
        self.broken = {id(self.link._flight[key].block) for key in keys}

    def is_ready(self, array) -> bool:
        return id(array) not in self.held | self.late and array.block_until_ready() is array

    def ready_within(self, array, seconds) -> bool:
        if id(array) in self.broken:
            raise Broken("the copy engine is gone")
        self.late.discard(id(array))
        return self.is_ready(array)


@pytest.fixture(scope="module")
def store():
    return tiny_store()


@pytest.fixture
def link(store, monkeypatch) -> AsyncLink:
    link = AsyncLink(SPEC, store, jax.devices()[0], slots=SLOTS, timeout=60.0)
    link.device = Device(link)
    monkeypatch.setattr(async_link, "is_ready", link.device.is_ready)
    monkeypatch.setattr(async_link, "ready_within", link.device.ready_within)
    return link


def test_only_the_link_that_can_prefetch_says_so(link, store):
    plain = DeviceLink(SPEC, store, jax.devices()[0], slots=SLOTS)
    assert plain.mode == "in_program"
    assert isinstance(plain, Link)
    assert not isinstance(plain, PrefetchLink)
    assert link.mode == "async"
    assert isinstance(link, PrefetchLink)
    assert link.pace.block_seconds > 0  # the probe


def test_prefetched_blocks_are_in_their_slots_once_they_have_arrived(link):
    link.prefetch([A, B], [3, 5])
    assert link.withdraw() == []  # both are under way
    assert link.arrived() == [A, B]
    assert link.arrived() == link.failed() == []
    assert marks(link.pool)[3] == mark(*A)
    assert marks(link.pool)[5] == mark(*B)
    assert (link.prefetches_begun, link.bytes_moved) == (2, 2 * SPEC.block_bytes)


def test_no_more_are_in_flight_than_the_plan_has_memory_for(link):
    keys = [(2, expert) for expert in range(SLOTS)]
    room = link._capacity
    link.prefetch(keys, range(SLOTS))
    assert link.prefetches_begun == room < SLOTS
    assert link.window() == 0
    assert link.withdraw() == keys[room:]
    assert link.arrived() == keys[:room]
    assert marks(link.pool) == [*(mark(*key) for key in keys[:room]), *[0] * (SLOTS - room)]


def test_a_block_that_is_not_there_is_not_told_of_and_not_waited_for(link):
    link.prefetch([A, B], [0, 1])
    link.device.hold(A)
    assert link.arrived() == [B]
    assert marks(link.pool)[:2] == [0, mark(*B)]
    link.device.held.clear()
    assert link.arrived() == [A]
    assert marks(link.pool)[:2] == [mark(*A), mark(*B)]


def test_waiting_brings_blocks_into_their_slots(link):
    link.prefetch([A, B, C], [0, 1, 2])
    link.wait([B, A])
    assert marks(link.pool)[:2] == [mark(*A), mark(*B)]
    assert link.arrived() == [C]


def test_demand_copies_go_on_beside_prefetches(link):
    link.prefetch([A], [0])
    link.finish(link.start(2, [3, 4]), [7, 8])
    assert link.arrived() == [A]
    link.settle()
    held = marks(link.pool)
    assert (held[0], held[7], held[8]) == (mark(*A), mark(2, 3), mark(2, 4))
    link.finish(link.start(2, []), [])
    assert marks(link.pool) == held


def test_a_prefetch_that_fails_leaves_its_slot_alone(link):
    link.prefetch([A, B, C], [0, 1, 2])
    link.device.break_(B)
    link.wait([B])
    assert link.failed() == [B]
    assert link.arrived() == [A, C]
    assert link.prefetches_failed == 1
    assert marks(link.pool)[:3] == [mark(*A), 0, mark(*C)]
    link.finish(link.start(*_demand(B)), [1])
    assert marks(link.pool)[1] == mark(*B)


def test_a_prefetch_that_the_device_does_not_take_fails_alone(link, monkeypatch):
    put = jax.device_put

    def refuse(blocks, sharding):
        if any(block is link._store.block(*B) for block in blocks):
            raise Broken("RESOURCE_EXHAUSTED: out of memory")
        return put(blocks, sharding)

    monkeypatch.setattr(jax, "device_put", refuse)
    link.prefetch([A, B, C], [0, 1, 2])
    assert link.arrived() == [A, C]
    assert link.failed() == [B]
    with pytest.raises(LinkError, match=r"^expert 2 of MoE layer 1 cannot be copied to the device: RESOURCE_EXHAUSTED"):
        link.start(*_demand(B))


def test_a_prefetch_that_never_comes_ends_with_the_timeout(link):
    link.prefetch([A, B], [0, 1])
    link.device.hold(A)
    link.wait([A])
    assert link.failed() == [A]
    link.prefetch([D], [2])
    link.device.hold(D)
    link._timeout = 0.0
    assert link.arrived() == [B]  # nobody waits for D
    assert link.failed() == [D]
    assert link.window() > 0  # its room is free again


def test_what_was_abandoned_is_never_written(link):
    keys = [(2, expert) for expert in range(SLOTS)]
    link.prefetch(keys, range(SLOTS))
    link.abandon()
    assert link.arrived() == link.failed() == link.withdraw() == []
    link.prefetch([A], [5])
    assert link.arrived() == [A]
    assert marks(link.pool) == [0] * 5 + [mark(*A)] + [0] * (SLOTS - 6)


def test_a_demand_copy_that_never_comes_is_one_clear_error(link):
    blocks = link.start(1, [2])
    link.device.held = {id(blocks[0])}
    with pytest.raises(LinkError, match=r"expert 2 of MoE layer 1 cannot be copied .* nothing has come for 60 s"):
        link.finish(blocks, [0])
    blocks = link.start(1, [2])
    link.device.held, link.device.broken = set(), {id(blocks[0])}
    with pytest.raises(LinkError, match=r"expert 2 of MoE layer 1 .* the copy engine is gone"):
        link.finish(blocks, [0])
    assert not any(marks(link.pool))


def test_the_pace_is_measured_where_the_link_is_waited_for(link):
    link._meter.block_seconds = 1e3
    link.prefetch([A], [0])
    link.wait([A])  # there already, so nothing is learnt
    assert link.pace.block_seconds == 1e3
    link.prefetch([B], [1])
    link.device.late = {id(link._flight[B].block)}
    link.wait([B])
    assert link.pace.block_seconds < 1e3
    assert marks(link.pool)[:2] == [mark(*A), mark(*B)]


def test_a_timeline_hears_of_every_copy(link, store):
    link.timeline = Timeline()
    link.finish(link.start(2, [3]), [7])
    link.prefetch([A], [0])
    link.arrived()
    plain = DeviceLink(SPEC, store, jax.devices()[0], slots=SLOTS)
    plain.timeline = link.timeline
    plain.finish(plain.start(2, [3, 4]), [0, 1])
    plain.finish(plain.start(2, []), [])
    assert [(span.track, span.args) for span in link.timeline._spans] == [
        ("copies: demand", {"layer": 2, "experts": [3]}),
        ("copies: prefetch", {"layer": 0, "expert": 1}),
        ("copies: demand", {"layer": 2, "experts": [3, 4]}),
    ]


def test_every_block_can_be_prefetched_over_and_over(store):
    """No stand-ins: as many rounds as it takes, in flight while others are."""
    link = AsyncLink(SPEC, store, jax.devices()[0], slots=SLOTS)
    rng = np.random.default_rng(0)
    holds = [0] * SLOTS
    for _ in range(60):
        free = rng.permutation(SLOTS).tolist()
        flat = rng.choice(LAYERS * EXPERTS, 6, replace=False).tolist()
        keys = [divmod(key, EXPERTS) for key in flat]
        link.withdraw()
        demand, ahead = keys[:2], keys[2:]
        blocks = [(link.start(layer, [expert]), slot) for (layer, expert), slot in zip(demand, free, strict=False)]
        link.prefetch(ahead, free[2:6])
        for block, slot in blocks:
            link.finish(block, [slot])
        link.wait(ahead)
        for key, slot in zip(keys, free, strict=False):
            holds[slot] = mark(*key)
        assert marks(link.pool) == holds
    assert link.failed() == link.arrived() == []
    assert 0.0 <= link.pace.idle_share <= 1.0


def test_large_blocks_are_few_in_flight():
    assert blocks_ahead(74_000) == 8
    assert blocks_ahead(9_437_184) == 7
    assert blocks_ahead(352_321_536) == 2


def test_readiness_is_asked_for_with_an_end(monkeypatch):
    array = jax.numpy.ones(3)
    assert readiness.ready_within(array, 60.0)
    monkeypatch.setattr(readiness, "is_ready", lambda array: False)
    assert not readiness.ready_within(array, 0.003)


def _demand(key):
    return key[0], [key[1]]
