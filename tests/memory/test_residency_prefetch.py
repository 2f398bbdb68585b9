"""The residency table with blocks in flight: random plans, arrivals and withdrawals against its invariants."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.memory.residency import Residency


class Case(NamedTuple):
    layers: int
    experts: int
    top_k: int
    slots: int
    floor_share: float | None
    events: list


@st.composite
def cases(draw):
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    key = st.tuples(st.integers(0, layers - 1), st.integers(0, experts - 1))
    some = st.lists(st.integers(0, experts - 1), min_size=1, max_size=top_k, unique=True)
    event = st.one_of(
        st.tuples(st.just("admit"), st.integers(0, layers - 1), some),
        st.tuples(st.just("reserve"), key, some),
        st.tuples(st.just("arrive"), st.integers(0, 99)),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
    )
    return Case(
        layers,
        experts,
        top_k,
        draw(st.integers(0, layers * experts)),
        draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
        draw(st.lists(event, max_size=60)),
    )


def check(residency: Residency) -> None:
    """Every slot has one key or is free, and the tables agree."""
    places = np.argwhere(residency.slot_of >= 0).tolist()
    resident = {(layer, expert): int(residency.slot_of[layer, expert]) for layer, expert in places}
    held = {key: slot for slot, key in enumerate(residency.key_of) if key is not None}
    assert {key: slot for key, slot in held.items() if key not in residency.in_flight} == resident
    assert not set(residency.in_flight) & set(resident)
    assert len(held) == len(set(held.values())) == sum(residency.count)
    for layer in range(residency.layers):
        assert residency.count[layer] == sum(key[0] == layer for key in held)
        spare = residency.count[layer] - residency.floors[layer]
        assert residency._spare[layer] == max(0, spare)
    assert sorted([*residency._free, *held.values()]) == list(range(residency.cache_slots))
    assert not residency.all_resident or len(resident) == residency.layers * residency.experts


@pytest.mark.parametrize("policy", POLICIES)
@given(cases())
def test_the_table_stays_consistent_and_never_loses_a_needed_key(policy, case):
    made = make_policy(policy, layers=case.layers, experts=case.experts, cache_slots=case.slots)
    if case.floor_share is not None:
        made.floor_share = case.floor_share
    residency = Residency(
        layers=case.layers, experts=case.experts, cache_slots=case.slots, staging_slots=case.top_k, policy=made
    )
    running, needed, arrived_unused = 0, [], 0
    for kind, *event in case.events:
        before = set(zip(*np.nonzero(residency.slot_of >= 0), strict=True))
        if kind == "admit":
            running, needed = event
            flying = set(residency.in_flight)
            residency.policy.on_step([7])
            admission = residency.admit(running, [needed])
            late = {e for e in needed if (running, e) in flying}
            hits = {e for e in needed if (running, e) in before}
            assert set(admission.late) == late
            assert admission.hits == len(hits)
            assert sorted([*late, *hits, *admission.missing]) == sorted(needed)
            assert set(residency.in_flight) == flying
            for expert in admission.late:
                residency.arrive(running, expert, used=True)
            row = residency.slot_row(running, admission)
            slots = [int(row[e]) for e in needed]
            assert min(slots) >= 0
            assert len(set(slots)) == len(slots)
            staged = {e for e, _ in admission.staged}
            needed = [e for e in needed if e not in staged]
        elif kind == "reserve":
            (layer, expert), keep = event
            closed = [running] if layer != running else []
            keep = [*keep, *needed] if layer == running else keep
            kept = {(layer, e) for e in keep} | {(running, e) for e in needed}
            known = (layer, expert) in before or (layer, expert) in residency.in_flight
            slot = residency.reserve(layer, expert, keep=keep, closed=closed)
            assert slot is None or not known
            assert slot is None or residency.key_of[slot] == (layer, expert)
            assert all(residency.slot_of[key] >= 0 for key in kept & before)
        elif residency.in_flight:
            key = residency.in_flight[event[0] % len(residency.in_flight)]
            if kind == "arrive":
                residency.arrive(*key)
                arrived_unused += 1
            else:
                residency.cancel(*key)
            assert key not in residency.in_flight
            assert (residency.slot_of[key] >= 0) == (kind == "arrive")
        check(residency)
    assert sum(residency.wasted) <= arrived_unused


def lru(slots: int, *, layers: int = 1, experts: int = 6) -> Residency:
    policy = make_policy("lru", layers=layers, experts=experts, cache_slots=slots)
    return Residency(layers=layers, experts=experts, cache_slots=slots, staging_slots=2, policy=policy)


def test_a_prefetched_block_that_leaves_unused_is_wasted_and_one_that_was_used_is_not():
    residency = lru(2)
    residency.reserve(0, 0)
    residency.reserve(0, 1)
    residency.arrive(0, 0)
    residency.arrive(0, 1)
    assert residency.admit(0, [[0]]).hits == 1
    residency.admit(0, [[2, 3]])
    assert sum(residency.wasted) == 1


def test_a_block_that_is_waited_for_is_late_and_never_wasted():
    residency = lru(1)
    residency.reserve(0, 4)
    assert residency.admit(0, [[4]]).late == [4]
    residency.arrive(0, 4, used=True)
    residency.admit(0, [[5]])
    assert sum(residency.wasted) == 0


def test_a_cancelled_slot_is_the_next_to_be_given_out():
    residency = lru(2)
    residency.admit(0, [[0]])
    slot = residency.reserve(0, 1)
    residency.cancel(0, 1)
    assert residency.admit(0, [[0, 2]]).missing_slots == [slot]


def test_a_full_table_with_a_block_on_its_way_is_not_all_resident():
    residency = lru(6)
    residency.seed(0, range(5))
    residency.reserve(0, 5)
    assert not residency.all_resident
    residency.arrive(0, 5)
    assert residency.all_resident


def test_a_closed_layer_loses_nothing():
    residency = lru(2, layers=2)
    residency.admit(0, [[0, 1]])
    assert residency.count == [2, 0]
    assert residency.reserve(1, 0, closed=[0]) is None
    assert residency.reserve(1, 0) is not None
