"""The emulated link: real blocks in real slots, and not before their time. Its clock here goes when told."""

import jax
import pytest

from ef_jax.errors import LinkError
from ef_jax.memory.policies import Key
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.link import PrefetchLink
from ef_jax.schedule.link_model import LinkModel
from tests.schedule.tiny_store import EXPERTS, SPEC, empty, mark, marks, tiny_store

A, B, C, D = (0, 1), (1, 2), (1, 3), (2, 0)
SLOTS = 12
SECOND = LinkModel(bandwidth=float(SPEC.block_bytes))  # a block takes one second


class Faulty(DeviceLink):
    """Copies of `broken` keys raise."""

    broken: tuple[Key, ...] = ()

    def fetch(self, keys):
        for key in keys:
            if key in self.broken:
                raise LinkError(f"{key} is broken")
        return super().fetch(keys)


@pytest.fixture(scope="module", params=["in_program", "async"])
def device(request) -> Faulty:
    return Faulty(SPEC, tiny_store(), jax.devices()[0], slots=SLOTS, mode=request.param)


@pytest.fixture
def link(device) -> EmulatedLink:
    device.broken = ()
    empty(device.pool)
    return EmulatedLink(device, SECOND, clock=VirtualClock())


def test_it_is_a_link_that_prefetches(link):
    assert isinstance(link, PrefetchLink)


def test_a_demand_copy_is_in_its_slots_after_its_time(link):
    link.finish(link.start(1, [4, 5]), [7, 2])
    assert link.clock.now == link.seconds == 2.0
    assert (marks(link.pool)[7], marks(link.pool)[2]) == (mark(1, 4), mark(1, 5))
    assert link.bytes_moved == 2 * SPEC.block_bytes
    link.finish(link.start(1, []), [])
    assert link.clock.now == 2.0


def test_prefetched_blocks_enter_their_slots_when_they_are_due(link):
    link.prefetch([A, B, C], [0, 1, 2])
    link.clock.advance(0.9)
    assert link.arrived() == []
    assert not any(marks(link.pool))
    link.clock.advance(1.2)
    assert link.arrived() == [A, B]
    assert marks(link.pool)[:3] == [mark(*A), mark(*B), 0]
    link.wait([C])
    assert link.clock.now == 3.0
    assert marks(link.pool)[:3] == [mark(*A), mark(*B), mark(*C)]
    assert link.arrived() == link.failed() == []


def test_more_blocks_than_an_insert_takes_come_together(link):
    keys = [(2, expert) for expert in range(SLOTS - 1)]
    link.prefetch(keys, range(1, SLOTS))
    link.clock.advance(60.0)
    assert link.arrived() == keys
    assert marks(link.pool) == [0, *(mark(*key) for key in keys)]


def test_what_was_withdrawn_is_never_written(link):
    link.prefetch([A, B], [0, 1])
    link.clock.advance(0.5)
    assert link.withdraw() == [B]
    link.prefetch([D], [1])
    link.clock.advance(60.0)
    assert link.arrived() == [A, D]
    assert marks(link.pool)[:3] == [mark(*A), mark(*D), 0]


def test_a_demand_copy_overtakes_what_has_not_begun(link):
    link.prefetch([A, B], [0, 1])
    link.clock.advance(0.5)
    link.finish(link.start(2, [0]), [5])
    assert link.clock.now == 2.0
    assert marks(link.pool)[5] == mark(*D)
    assert link.arrived() == [A]


def test_a_prefetch_that_raises_has_failed_and_the_others_have_not(link):
    link._link.broken = (B,)
    link.prefetch([A, B, C], [0, 1, 2])
    link.clock.advance(60.0)
    assert link.arrived() == [A, C]
    assert link.failed() == [B]
    assert link.failed() == []
    assert (link.prefetches_begun, link.prefetches_failed) == (3, 1)
    assert marks(link.pool)[:3] == [mark(*A), 0, mark(*C)]


def test_a_prefetch_that_raises_while_it_is_waited_for_has_failed(link):
    link._link.broken = (A,)
    link.prefetch([A, B], [0, 1])
    link.clock.advance(1.5)
    link.wait([A, B])
    assert link.failed() == [A]
    assert link.arrived() == []
    assert marks(link.pool)[:2] == [0, mark(*B)]


def test_a_demand_copy_that_raises_is_one_clear_error(link):
    link._link.broken = (A,)
    with pytest.raises(LinkError, match="broken"):
        link.start(0, [1])


def test_a_copy_that_never_comes_ends_the_waiting(link):
    link._timeout = 5.0
    link.prefetch([A, B], [0, 1])
    link.clock.advance(0.5)
    link.set_model(LinkModel(bandwidth=1e-9))
    link.clock.advance(1.0)
    link.wait([A, B])
    assert link.clock.now == 1.5 + 5.0
    assert link.failed() == [B]
    assert marks(link.pool)[:2] == [mark(*A), 0]
    blocks = link.start(2, [0, 1])
    with pytest.raises(
        LinkError, match=r"expert 0 of MoE layer 2, expert 1 of MoE layer 2 .* nothing has come for 5 s"
    ):
        link.finish(blocks, [3, 4])
    assert link.clock.now == 6.5 + 5.0
    assert not any(marks(link.pool)[1:])


def test_what_was_abandoned_is_never_written(link):
    link._link.broken = (A,)
    link.prefetch([A, B, C], [0, 1, 2])
    link.clock.advance(1.5)
    link.arrived()  # A has failed, B is under way
    link.abandon()
    link.prefetch([D], [1])
    link.clock.advance(60.0)
    assert link.arrived() == [D]
    assert link.failed() == []
    assert marks(link.pool)[:3] == [0, mark(*D), 0]


def test_a_link_a_thousand_times_slower_still_serves(link):
    link.set_model(LinkModel(bandwidth=SPEC.block_bytes / 1000))
    link._timeout = 1e4
    link.finish(link.start(0, [1, 2]), [0, 1])
    assert link.clock.now == 2000.0
    assert marks(link.pool)[:2] == [mark(0, 1), mark(0, 2)]


def test_on_the_wall_clock_a_copy_takes_no_less_than_its_model_says(device):
    empty(device.pool)
    link = EmulatedLink(device, LinkModel(bandwidth=SPEC.block_bytes / 2e-3, latency=1e-3))
    began = link.clock.now
    link.finish(link.start(0, [1, 2]), [0, 1])
    assert link.clock.now - began >= 5e-3
    link.prefetch([B], [2])
    link.clock.wait_until(link.clock.now + 1e-4)
    assert link.withdraw() == []
    link.wait([B])
    assert link.clock.now - began >= 8e-3
    assert marks(link.pool)[:3] == [mark(0, 1), mark(0, 2), mark(*B)]
    assert link.pace.block_seconds >= 2e-3


def test_the_keys_of_an_error_are_few(device):
    link = EmulatedLink(device, LinkModel(bandwidth=1e-9), clock=VirtualClock(), timeout=1.0)
    with pytest.raises(LinkError, match=f"expert 2 of MoE layer 0 and {EXPERTS - 3} more cannot be copied"):
        link.finish(link.start(0, range(EXPERTS)), range(EXPERTS))
