"""Every policy against its contract, against slow plain references, and on routing that nobody can predict."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES, Policy, make_policy
from ef_jax.memory.policies.plec import Plec, quotas
from ef_jax.memory.policies.ranked import predicted
from ef_jax.memory.policies.static import Static
from ef_jax.memory.policies.two_level import TwoLevel
from ef_jax.memory.residency import Residency


def table(policy: Policy, staging: int = 8) -> Residency:
    return Residency(
        layers=policy.layers,
        experts=policy.experts,
        cache_slots=policy.cache_slots,
        staging_slots=staging,
        policy=policy,
    )


def resident(residency: Residency) -> set[tuple[int, int]]:
    return {key for key in residency.key_of if key is not None}


class Watched:
    """Passes everything on to a policy, and checks what it answers."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.held = policy, set()

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def on_enter(self, layer, expert):
        self.held.add((layer, expert))
        self.policy.on_enter(layer, expert)

    def on_evict(self, layer, expert):
        self.held.remove((layer, expert))
        self.policy.on_evict(layer, expert)

    def victims(self, layer, missing, needed, spare):
        before = list(spare)
        answer = self.policy.victims(layer, missing, needed, spare)
        assert list(spare) == before
        assert len(answer) == len(missing)
        keys = [key for key in answer if key is not None]
        assert len(set(keys)) == len(keys)
        assert set(keys) <= self.held
        assert not {(layer, expert) for expert in needed} & set(keys)
        for loser in range(self.policy.layers):
            assert sum(key[0] == loser for key in keys) <= spare[loser]
        return answer


@st.composite
def decoding(draw):
    """Steps of a small model: routes `[steps][L][B][K]`, and for some steps predictions `[L, E]`."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    top_k, batch = draw(st.integers(1, min(3, experts))), draw(st.integers(1, 2))
    cache = draw(st.integers(1, layers * experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    popularity = rng.random((layers, experts)) ** 3 + 0.01
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        draws = popularity[:, None] * rng.random((layers, batch, experts))
        routes = np.argsort(-draws, axis=2)[:, :, :top_k].tolist()
        steps.append((routes, rng.random((layers, experts), np.float32) if rng.random() < 0.5 else None))
    return layers, experts, cache, draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), steps


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(decoding())
def test_victims_are_distinct_resident_unneeded_and_within_what_each_layer_may_lose(name, case):
    layers, experts, cache, floor_share, steps = case
    policy = make_policy(name, layers=layers, experts=experts, cache_slots=cache)
    policy.floor_share = floor_share
    residency = table(policy)
    residency.policy = Watched(policy)
    for routes, scores in steps:
        residency.policy.on_step([0])
        if scores is not None:
            residency.policy.on_predict(scores)
        for layer, rows in enumerate(routes):
            residency.admit(layer, rows)
            assert all(count >= 0 for count in residency.count)
    assert residency.policy.held == resident(residency)


class Reference:
    """One list of resident keys over all layers, one worth a key, computed from the whole history of uses."""

    def __init__(self, name, cache):
        self.name, self.cache, self.kept, self.high = name, cache, [], []
        self.uses = {}  # key: [(step, layers run, place in the order of uses)]
        self.step = self.runs = self.place = 0

    def worth(self, key):
        uses = self.uses[key]
        if self.name == "lfu":
            return sum(2.0 ** (step / 64) for step, _, _ in uses), key
        if self.name == "lfru":
            return len(uses) / (self.runs + 1 - uses[-1][1]), key
        return key in self.high, uses[-1][2]

    def run(self, layer, rows):
        self.runs += 1
        needed = list(dict.fromkeys(expert for row in rows for expert in row))
        hits = [expert for expert in needed if (layer, expert) in self.kept]
        for row in rows:
            for expert in reversed(row):
                key = layer, expert
                self.place += 1
                self.uses.setdefault(key, []).append((self.step, self.runs, self.place))
                if self.name == "two_level" and key in self.kept:
                    self.reuse(key)
        for expert in needed:
            if expert not in hits:
                self.kept.append((layer, expert))
        over = len(self.kept) - self.cache
        leaving = sorted((k for k in self.kept if k[0] != layer or k[1] not in needed), key=self.worth)[: max(over, 0)]
        self.kept = [key for key in self.kept if key not in leaving]
        self.high = [key for key in self.high if key not in leaving]
        return len(hits)

    def reuse(self, key):
        self.high = [*(other for other in self.high if other != key), key]
        mine = [other for other in self.high if other[0] == key[0]]
        if 2 * len(mine) > sum(other[0] == key[0] for other in self.kept):
            self.high.remove(mine[0])


@pytest.mark.parametrize("name", ["lfu", "lfru", "two_level"])
@given(decoding())
def test_without_floors_a_policy_is_its_plain_definition(name, case):
    layers, experts, cache, _, steps = case
    most = max(len({e for row in rows for e in row}) for routes, _ in steps for rows in routes)
    cache = max(cache, most)
    policy = make_policy(name, layers=layers, experts=experts, cache_slots=cache)
    policy.floor_share = 0.0
    residency, reference = table(policy), Reference(name, cache)
    for routes, _ in steps:
        policy.on_step([0])
        reference.step += 1
        for layer, rows in enumerate(routes):
            assert residency.admit(layer, rows).hits == reference.run(layer, rows)
            assert resident(residency) == set(reference.kept)


@given(decoding())
def test_plec_takes_the_oldest_keys_above_the_quotas(case):
    layers, experts, cache, _, steps = case
    policy = Plec(layers=layers, experts=experts, cache_slots=cache)
    policy.floor_share = 0.0
    share = quotas(np.ones(layers), slots=cache, most=experts)
    residency, last, clock = table(policy), {}, 0
    for routes, _ in steps[:7]:  # then quotas follow the past
        policy.on_step([0])
        for layer, rows in enumerate(routes):
            needed = {expert for row in rows for expert in row}
            before = resident(residency)
            for row in rows:
                for expert in reversed(row):
                    clock += 1
                    last[layer, expert] = clock
            admission = residency.admit(layer, rows)
            lost = before - resident(residency)
            above = [max(0, sum(key[0] == other for key in before) - share[other]) for other in range(layers)]
            wanted = max(0, len(admission.missing) - (cache - len(before)))
            above[layer] = max(0, sum(key[0] == layer for key in before) + wanted - share[layer])
            expected = set()
            for key in sorted(before, key=lambda key: last[key]):
                if len(expected) < wanted and above[key[0]]:
                    if key[0] == layer and key[1] in needed:
                        continue
                    above[key[0]] -= 1
                    expected.add(key)
            assert lost == expected


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.data(),
)
def test_quotas_go_slot_by_slot_to_the_layer_of_the_largest_claim(need, most, data):
    slots = data.draw(st.integers(0, len(need) * most))
    claims = need if any(need) else [1] * len(need)
    share = [0] * len(need)
    for _ in range(slots):
        open_ = [layer for layer in range(len(need)) if share[layer] < most]
        share[max(open_, key=lambda layer: (claims[layer] / (share[layer] + 1), -layer))] += 1
    assert quotas(np.array(need, np.float64), slots=slots, most=most) == share


def test_the_worked_examples_of_expertflow():
    assert quotas(np.array([3.0, 2.0]), slots=4, most=8) == [3, 1]
    assert quotas(np.array([3.0, 2.0]), slots=5, most=8) == [3, 2]


def test_plec_drops_what_was_predicted_in_vain_and_spares_what_is_to_come():
    policy = Plec(layers=2, experts=4, cache_slots=5)
    policy.floor_share = 0.0
    residency = table(policy)
    residency.admit(0, [[0, 1]])
    residency.admit(1, [[0, 1]])
    residency.admit(0, [[2]])
    scores = np.zeros((2, 4), np.float32)
    scores[0, 2] = scores[1, 0] = 1.0  # (0, 2) was used last and (1, 0) long ago
    policy.on_step([0])
    policy.on_predict(scores)
    residency.admit(0, [[3]])
    assert resident(residency) == {(0, 0), (0, 1), (0, 3), (1, 0), (1, 1)}
    residency.admit(1, [[0, 2, 3]])  # layer 0 has run: its oldest keys make room at once
    assert resident(residency) == {(0, 3), (1, 0), (1, 1), (1, 2), (1, 3)}


def test_two_level_protects_what_the_window_predicts():
    policy = TwoLevel(layers=3, experts=4, cache_slots=3)
    policy.floor_share, policy.window = 0.0, 1
    residency = table(policy)
    for layer in range(3):
        residency.admit(layer, [[0]])
    scores = np.zeros((3, 4), np.float32)
    scores[1, 0] = scores[2, 0] = 1.0
    policy.on_step([0])
    policy.on_predict(scores)
    residency.admit(0, [[1]])  # (1, 0) is inside the window of one layer; (0, 0) is older than (2, 0)
    assert resident(residency) == {(0, 1), (1, 0), (2, 0)}
    residency.admit(0, [[2]])  # (2, 0) is predicted, but beyond the window
    assert resident(residency) == {(0, 1), (0, 2), (1, 0)}


def test_static_fills_with_the_chosen_hot_set_and_nothing_else_may_displace_it():
    policy = Static(layers=2, experts=4, cache_slots=3)
    counts = np.zeros((2, 4), np.int64)
    counts[0, 1], counts[1, 2], counts[1, 3] = 5, 9, 7
    policy.choose(counts)
    residency = table(policy)
    residency.admit(0, [[0, 1, 2]])
    assert resident(residency) == {(0, 0), (0, 1), (0, 2)}
    residency.admit(1, [[2, 0]])
    residency.admit(1, [[3, 1]])
    assert resident(residency) == {(0, 1), (1, 2), (1, 3)}
    residency.admit(0, [[2, 3]])
    assert resident(residency) == {(0, 1), (1, 2), (1, 3)}


@pytest.mark.parametrize("name", POLICIES)
def test_hits_do_not_collapse_below_one_token_cycle(name):
    """Most tokens use the same experts; 12 slots for a cycle of 24. One list of ages would never hit."""
    policy = make_policy(name, layers=8, experts=16, cache_slots=12)
    residency, rng = table(policy), np.random.default_rng(0)
    hits = asked = 0
    for _ in range(300):
        policy.on_step([0])
        for layer in range(8):
            row = [0, 1, 2] if rng.random() < 0.8 else rng.permutation(16)[:3].tolist()
            hits += residency.admit(layer, [row]).hits
            asked += 3
    assert hits / asked > 0.25


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_wins_on_uniform_routing(name):
    """Each expert is as likely as any other: hits are the share of the asking layer that is resident, no more."""
    layers, experts, top_k, cache = 4, 16, 2, 20
    policy = make_policy(name, layers=layers, experts=experts, cache_slots=cache)
    residency, rng = table(policy), np.random.default_rng(1)
    hits, expected, asked = 0, 0.0, 0
    for step in range(1500):
        policy.on_step([step])
        for layer in range(layers):
            row = rng.permutation(experts)[:top_k].tolist()
            if step >= 20:
                expected += top_k * residency.count[layer] / experts
                asked += top_k
            found = residency.admit(layer, [row]).hits
            hits += found if step >= 20 else 0
    share = cache / (layers * experts)
    error = np.sqrt(share * (1 - share) / asked)
    assert abs(hits - expected) / asked < 4 * error
    assert abs(hits / asked - share) < 4 * error


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_teaches_what_is_used_most(name):
    policy = make_policy(name, layers=1, experts=4, cache_slots=3)
    residency = table(policy)
    residency.seed(0, [0, 1, 2])
    policy.on_prompt(0, np.array([5, 1, 9, 0]))
    policy.on_step([0])
    residency.admit(0, [[3]])
    assert resident(residency) == ({(0, 0), (0, 1), (0, 2)} if name == "static" else {(0, 0), (0, 2), (0, 3)})


def test_lfu_scales_its_numbers_without_changing_their_order():
    short, long = (make_policy("lfu", layers=1, experts=8, cache_slots=3) for _ in range(2))
    long.half_life = short.half_life = 1
    tables = table(short), table(long)
    for _ in range(510):
        long.on_step([0])
    rng = np.random.default_rng(0)
    for _ in range(30):
        row = rng.permutation(8)[:2].tolist()
        for policy, residency in zip((short, long), tables, strict=True):
            policy.on_step([0])
            residency.admit(0, [row])
        assert resident(tables[0]) == resident(tables[1])
    assert np.isfinite(long.frequency).all()


def test_predictions_name_as_many_keys_as_they_expect_uses():
    scores = np.array([[0.9, 0.6, 0.4, 0.1], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 1.0, 0.0]], np.float32)
    assert predicted(scores).tolist() == [[True, True, False, False], [False] * 4, [True, False, True, False]]


def test_an_unknown_policy_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"policy 'fifo' is not one of lru, lfu, lfru, two_level, plec, static"):
        make_policy("fifo", layers=1, experts=2, cache_slots=1)


_TRAFFIC = """
import sys
import numpy as np
from ef_jax.memory.policies import POLICIES, make_policy
from ef_jax.memory.residency import Residency
for name in POLICIES:
    policy = make_policy(name, layers=3, experts=8, cache_slots=9)
    table = Residency(layers=3, experts=8, cache_slots=9, staging_slots=8, policy=policy)
    rng = np.random.default_rng(0)
    for step in range(60):
        policy.on_step([step])
        for layer in range(3):
            table.admit(layer, rng.permuted(np.tile(np.arange(8), (2, 1)), axis=1)[:, :2].tolist())
    print(name, table.slot_of.tolist())
assert "jax" not in sys.modules
"""


def test_policies_do_not_depend_on_the_hash_seed_and_need_no_jax():
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", _TRAFFIC],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
