"""The residency table against its invariants, and the policies against brute force."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.memory.residency import Residency
from ef_jax.schedule.prompt_waves import prompt_waves


def table(layers: int, experts: int, cache: int, staging: int, name: str = "lru", floor_share: float | None = None):
    policy = make_policy(name, layers=layers, experts=experts, cache_slots=cache)
    if floor_share is not None:
        policy.floor_share = floor_share
    return Residency(layers=layers, experts=experts, cache_slots=cache, staging_slots=staging, policy=policy)


def check(residency: Residency) -> None:
    held = [(slot, key) for slot, key in enumerate(residency.key_of) if key is not None]
    for slot, key in held:
        assert residency.slot_of[key] == slot
    assert (residency.slot_of >= 0).sum() == len(held) == sum(residency.count)
    assert residency.count == [int((row >= 0).sum()) for row in residency.slot_of]


@st.composite
def traffic(draw):
    layers = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    cache = draw(st.integers(0, layers * experts))
    steps = draw(
        st.lists(
            st.tuples(
                st.booleans(),
                st.integers(0, layers - 1),
                st.lists(st.integers(0, experts - 1), min_size=1, max_size=top_k, unique=True),
            ),
            max_size=60,
        )
    )
    return layers, experts, top_k, cache, steps


@pytest.mark.parametrize("policy", POLICIES)
@given(traffic())
def test_every_needed_expert_gets_its_own_slot_and_the_table_stays_consistent(policy, case):
    layers, experts, top_k, cache, steps = case
    residency = table(layers, experts, cache, top_k, policy)
    for prompt, layer, needed in steps:
        if prompt:
            before = set(residency.key_of) - {None}
            counts = np.bincount(needed, minlength=experts)
            waves, hits, misses = prompt_waves(residency, layer, counts, wave_size=2)
            residency.policy.on_prompt(layer, counts)
            assert hits + misses == len(needed)
            assert sorted(e for wave in waves for e in np.flatnonzero(wave.slot_row >= 0) if e in needed) == sorted(
                needed
            )
            assert before <= set(residency.key_of)  # a prompt evicts nothing
        else:
            resident = {e for e in needed if residency.slot_of[layer, e] >= 0}
            admission = residency.admit(layer, [needed])
            row = residency.slot_row(layer, admission)
            slots = [int(row[e]) for e in needed]
            assert len(set(slots)) == len(slots)
            assert min(slots) >= 0
            assert max(slots) < cache + top_k
            assert admission.hits == len(resident)
            assert set(admission.missing) == set(needed) - resident
            assert admission.missing_slots == [int(row[e]) for e in admission.missing]
        check(residency)


@given(traffic())
def test_lru_without_floors_is_the_textbook_lru(case):
    layers, experts, top_k, cache, steps = case
    cache = max(cache, top_k)
    residency = table(layers, experts, cache, top_k, floor_share=0.0)
    reference: OrderedDict = OrderedDict()
    for _, layer, needed in steps:
        hits = [e for e in needed if (layer, e) in reference]
        admission = residency.admit(layer, [needed])
        assert admission.hits == len(hits)
        for expert in [*hits, *(e for e in needed if e not in hits)]:
            if (layer, expert) not in reference and len(reference) == cache:
                victim = next(key for key in reference if key[0] != layer or key[1] not in needed)
                del reference[victim]
            reference[layer, expert] = True
            reference.move_to_end((layer, expert))
        assert {key for key in residency.key_of if key is not None} == set(reference)


def test_floors_keep_hits_below_one_token_cycle():
    """4 layers x 2 experts a token with 6 slots: a global LRU never hits, a floor of one does."""
    hits = {}
    for share in (0.0, 1.0):
        residency = table(4, 8, 6, 2, floor_share=share)
        hits[share] = sum(residency.admit(layer, [[0, 1]]).hits for _ in range(20) for layer in range(4))
    assert hits[0.0] == 0
    assert hits[1.0] >= 19 * 4


def test_static_keeps_what_came_first_and_passes_the_rest_through_staging():
    residency = table(1, 6, 2, 2, "static")
    residency.admit(0, [[0, 1]])
    admission = residency.admit(0, [[2, 3]])
    assert admission.missing_slots == [2, 3]
    assert residency.key_of == [(0, 0), (0, 1)] or residency.key_of == [(0, 1), (0, 0)]
    assert residency.admit(0, [[0, 2]]).hits == 1


def test_more_experts_than_staging_slots_is_refused():
    with pytest.raises(ValueError, match="3 experts must pass through 2 staging slots"):
        table(1, 4, 0, 2).admit(0, [[0, 1, 2]])


def test_seeding_stays_within_a_layers_share():
    residency = table(2, 8, 8, 2)
    assert [expert for expert, _ in residency.seed(0, range(8))] == [0, 1, 2, 3]
    assert not residency.all_resident
    residency = table(2, 4, 8, 0)
    for layer in range(2):
        residency.seed(layer, range(4))
    assert residency.all_resident
    assert np.array_equal(np.sort(residency.slot_of.ravel()), np.arange(8))
