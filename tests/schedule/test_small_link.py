"""Copies of smaller blocks over the wire of another link: in their slots, in their turn, and counted."""

import dataclasses

import jax
import numpy as np
import pytest

from ef_jax.errors import LinkError
from ef_jax.memory.host_store import HostStore
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.async_link import AsyncLink
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.small_link import SmallLink
from ef_jax.timeline import Timeline
from pallas_kernels import storage_dtype
from tests.schedule.tiny_store import SPEC, marks, tiny_store

DEVICE = jax.devices()[0]
HALF = dataclasses.replace(SPEC, experts=dataclasses.replace(SPEC.experts, width=SPEC.experts.width // 2))
SECOND = LinkModel(bandwidth=float(SPEC.block_bytes))  # a block takes one second, a small one half of it


def copies(mode: str) -> DeviceLink:
    pinned = jax.sharding.SingleDeviceSharding(DEVICE, memory_kind="pinned_host")
    dtype = storage_dtype(HALF.dtype)
    blocks = [[jax.device_put(np.full(HALF.block_shape, 50 + expert, dtype), pinned) for expert in range(4)]] * 2
    return DeviceLink(HALF, HostStore(HALF, blocks), DEVICE, slots=3, mode=mode)


@pytest.fixture(scope="module", params=["in_program", "async"])
def devices(request: pytest.FixtureRequest) -> tuple[DeviceLink, DeviceLink]:
    return DeviceLink(SPEC, tiny_store(), DEVICE, slots=4, mode=request.param), copies(request.param)


def test_small_copies_take_their_turn_and_their_time(devices: tuple[DeviceLink, DeviceLink]) -> None:
    wire = EmulatedLink(devices[0], SECOND, clock=VirtualClock())
    small = SmallLink(devices[1], wire)
    first = small.start(1, [3, 0])
    full = wire.start(1, [2])
    small.finish(first, [2, 0])
    assert wire.clock.now == 1.0 <= wire.seconds
    assert marks(small.pool)[::2] == [50, 53]
    wire.finish(full, [0])
    assert wire.clock.now == 2.0
    assert wire.bytes_moved == 2 * SPEC.block_bytes
    assert wire.pace.block_seconds == 1.0


def test_a_small_copy_that_takes_too_long_is_given_up(devices: tuple[DeviceLink, DeviceLink]) -> None:
    wire = EmulatedLink(devices[0], SECOND, clock=VirtualClock(), timeout=0.75)
    small = SmallLink(devices[1], wire)
    with pytest.raises(LinkError, match=r"expert 3 of MoE layer 1, expert 0 .*nothing has come for 0\.75 s"):
        small.finish(small.start(1, [3, 0]), [0, 1])


def test_an_asynchronous_link_counts_them_among_what_is_under_way() -> None:
    wire, timeline = AsyncLink(SPEC, tiny_store(), DEVICE, slots=4), Timeline()
    small = SmallLink(copies("async"), wire)
    wire.timeline = timeline
    small.finish(small.start(0, [1, 2]), [1, 2])
    assert marks(small.pool)[1:] == [51, 52]
    assert wire.bytes_moved == SPEC.block_bytes
    assert [span.args["experts"] for span in timeline._spans] == [[1, 2]]
