"""When the rows of resident experts run before the others."""

import pytest

from ef_jax.errors import InputError
from ef_jax.memory.residency import Admission
from ef_jax.replay.simulated_link import FreeLink, SimulatedLink
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.token_order import check_order, run_there_first

SOME = Admission(hits=3, late=[], missing=[4], missing_slots=[0], staged=[])
NONE_THERE = Admission(hits=0, late=[], missing=[4], missing_slots=[0], staged=[])


def link(seconds_a_block: float) -> SimulatedLink:
    return SimulatedLink(LinkModel(bandwidth=1e6 / seconds_a_block), VirtualClock(), block_bytes=10**6)


def test_auto_looks_at_the_wait():
    slow, fast = link(1e-3), link(1e-5)
    for one in (slow, fast):
        one.finish(one.start(0, [1]), [0])
    assert run_there_first("auto", SOME, slow)
    assert not run_there_first("auto", SOME, fast)
    assert not run_there_first("auto", SOME, FreeLink())


def test_the_others_do_as_they_say_but_not_for_nothing():
    assert run_there_first("resident_first", SOME, FreeLink())
    assert not run_there_first("resident_first", NONE_THERE, FreeLink())
    assert not run_there_first("together", SOME, link(1.0))
    with pytest.raises(InputError, match="'first' is not one of"):
        check_order("first")
