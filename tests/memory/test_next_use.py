"""`next_use`: its components against plain sums, its values against known ones, its hits against other policies.

Statistical tests have fixed seeds. Sizes are small, so what is learned is learned from little.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.memory.policies import make_policy, use_value
from ef_jax.memory.policies.routing_components import RoutingComponents
from ef_jax.memory.policies.use_value import UseValue
from ef_jax.memory.residency import Residency
from ef_jax.replay.belady import belady
from ef_jax.replay.layer_steps import layer_steps
from ef_jax.replay.trace import RoutingTrace

LEAST = 0.01


# Routing to test with: int arrays [N, L, K].


def uniform(steps: int, *, layers: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((steps, layers, experts)).argsort(-1)[..., :top_k]


def loop(steps: int, *, layers: int, period: int) -> np.ndarray:
    """Step n uses expert n mod period of every layer."""
    return np.broadcast_to((np.arange(steps) % period)[:, None, None], (steps, layers, 1))


def sticky(steps: int, *, layers: int, experts: int, top_k: int, leave: float, seed: int = 0) -> np.ndarray:
    """Each chosen expert leaves with probability `leave` a step; another, any of the unused, takes its place."""
    random = np.random.default_rng(seed)
    order = random.random((layers, experts)).argsort(-1)
    rows = []
    for leaving in random.random((steps, layers, top_k)) < leave:
        for layer, place in np.argwhere(leaving):
            other = random.integers(top_k, experts)
            order[layer, [place, other]] = order[layer, [other, place]]
        rows.append(order[:, :top_k].copy())
    return np.array(rows)


def by_token(
    steps: int, *, layers: int, experts: int, top_k: int, vocabulary: int = 40, noise: float = 0.15, seed: int = 0
) -> np.ndarray:
    """A token decides what every layer uses, but for noise. Tokens are Zipf's; half of them follow from the last."""
    random = np.random.default_rng(seed)
    chances = 1 / np.arange(1, vocabulary + 1)
    popular = 0.8 * random.standard_normal((layers, experts))
    favourites = (-popular - random.gumbel(size=(vocabulary, layers, experts))).argsort(-1)[..., :top_k]
    following, drawn = random.permutation(vocabulary), random.choice(vocabulary, steps, p=chances / chances.sum())
    tokens = [0]
    for token, follows in zip(drawn, random.random(steps) < 0.5, strict=True):
        tokens.append(following[tokens[-1]] if follows else token)
    noisy = random.random((steps, layers, 1)) < noise
    other = random.random((steps, layers, experts)).argsort(-1)[..., :top_k]
    return np.where(noisy, other, favourites[tokens[1:]])


def table(name: str, cache: int, *, layers: int, experts: int, staging: int = 16) -> Residency:
    policy = make_policy(name, layers=layers, experts=experts, cache_slots=cache)
    return Residency(layers=layers, experts=experts, cache_slots=cache, staging_slots=staging, policy=policy)


def step(residency: Residency, rows: list[list[list[int]]]) -> int:
    """Hits of a step that uses the experts `rows[l][b]`."""
    residency.policy.on_step([0])
    return sum(residency.admit(layer, row).hits for layer, row in enumerate(rows))


def hits(residency: Residency, routes: np.ndarray) -> np.ndarray:
    """Share of the uses of each step that hit, `[N]`; one sequence."""
    return np.array([step(residency, [[row] for row in rows]) for rows in routes.tolist()]) / routes[0].size


def clairvoyant(routes: np.ndarray, cache: int, *, experts: int) -> float:
    """Share of all uses that Belady's rule hits."""
    count = len(routes)
    trace = RoutingTrace(
        experts=routes.astype(np.uint8),
        tokens=np.zeros(count, np.int32),
        offsets=np.array([0, count]),
        num_experts=experts,
        phases=np.ones(count, np.uint8),
    )
    return sum(belady(layer_steps(trace, 1), cache).hits) / routes.size


# Components.


def chunked(data: np.ndarray, chunks: int) -> np.ndarray:
    """`[n, keys]` as `RoutingComponents` takes it."""
    return np.ascontiguousarray(data.reshape(len(data), chunks, -1).swapaxes(0, 1), np.float32)


def from_scratch(components: RoutingComponents, last: list[list[int]], experts: int) -> np.ndarray:
    keys = [layer * experts + expert for layer, row in enumerate(last) for expert in row]
    return components._basis.astype(np.float64)[keys].sum(0) - components._mean


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32), st.booleans())
def test_components_are_those_of_the_last_routes_less_their_mean(layers, experts, seed, narrow):
    random = np.random.default_rng(seed)
    rank = max(1, layers * experts // (3 if narrow else 1))
    components = RoutingComponents(layers=layers, experts=experts, rank=rank, chunks=layers)
    last: list[list[int]] = [[] for _ in range(layers)]
    for count in range(1, 30):
        for layer in range(layers):
            last[layer] = random.integers(0, experts, random.integers(1, 6)).tolist()  # repeats: several sequences
            components.move(layer, last[layer])
            np.testing.assert_allclose(components.now, from_scratch(components, last, experts), atol=1e-5)
        components.end_step(count)
        np.testing.assert_allclose(components.now, from_scratch(components, last, experts), atol=1e-5)
        if count % 7 == 0:
            components.learn(chunked(random.random((16, layers * experts)) - 0.5, layers), keep=0.5)
            components.turn()
            np.testing.assert_allclose(components.now, from_scratch(components, last, experts), atol=1e-5)


def test_the_mean_is_that_of_all_steps_while_they_are_few():
    random = np.random.default_rng(0)
    components = RoutingComponents(layers=2, experts=8, rank=5, chunks=1)
    seen = [np.zeros(5)]
    for count in range(1, 60):
        routes = [random.permutation(8)[:2].tolist() for _ in range(2)]
        for layer, row in enumerate(routes):
            components.move(layer, row)
        seen.append(components.now + components._mean)
        components.end_step(count)
    np.testing.assert_allclose(components._mean, np.mean(seen, 0), atol=1e-5)


def test_turning_a_whole_basis_is_a_rotation():
    random = np.random.default_rng(0)
    components = RoutingComponents(layers=2, experts=4, rank=8, chunks=4)
    before, data = components._basis.copy(), random.standard_normal((64, 8)).astype(np.float32)
    components.learn(chunked(data, 4), keep=0.5)
    turn = components.turn()
    np.testing.assert_allclose(turn.T @ turn, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(data @ before @ turn, data @ components._basis, atol=1e-5)


def test_turning_takes_what_the_old_basis_knew_to_the_new_one():
    """The new basis is orthonormal and spans the sketch. Of data outside the old basis `turn` has no knowledge, so the
    components that it carries over are those of the data's projection on the old basis."""
    random = np.random.default_rng(1)
    components = RoutingComponents(layers=3, experts=8, rank=6, chunks=3)
    before, data = components._basis.copy(), random.standard_normal((64, 24)).astype(np.float32)
    components.learn(chunked(data, 3), keep=0.5)
    sketch = components._sketch.reshape(24, 6).copy()
    turn = components.turn()
    after = components._basis
    np.testing.assert_allclose(after.T @ after, np.eye(6), atol=1e-4)
    np.testing.assert_allclose(after @ (after.T @ sketch), sketch, atol=1e-3 * np.abs(sketch).max())
    np.testing.assert_allclose(data @ before @ turn, (data @ before @ before.T) @ after, atol=1e-4)


def test_the_basis_finds_the_space_of_data_of_low_rank():
    random = np.random.default_rng(2)
    components = RoutingComponents(layers=3, experts=16, rank=8, chunks=6)
    space = np.linalg.qr(random.standard_normal((48, 4)))[0].T
    for _ in range(4):
        drawn = random.standard_normal((32, 4)) * [8, 4, 2, 1]
        components.learn(chunked(drawn @ space, 6), keep=0.9)
        components.turn()
    leading = components._basis[:, -4:]
    np.testing.assert_allclose(leading.T @ leading, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(space @ leading @ leading.T, space, atol=1e-4)
    assert np.linalg.norm(components._basis[:, :4]) < 0.1  # nothing is there for the others to find


# Values.


def learn(value: UseValue, routes: np.ndarray, life: float) -> np.ndarray:
    """Values after every step, `[N, L, E]`."""
    after = []
    for rows in routes.tolist():
        for layer, row in enumerate(rows):
            value.route(layer, row)
        value.end_step(life)
        after.append(value.values.copy())
    return np.array(after)


def test_values_do_not_depend_on_how_a_layer_is_cut_into_products(monkeypatch):
    routes = by_token(200, layers=2, experts=24, top_k=3)
    counts = np.arange(24)
    rows = []
    for chunk in (24, 8, 5):
        monkeypatch.setattr(use_value, "_CHUNK", chunk)
        value = UseValue(layers=2, experts=24)
        for layer in range(2):
            value.prompt(layer, counts, 30)
        steps = learn(value, routes, 8.0)
        rows.append((steps, value.route(1, [2, 23]).copy()))
    for steps, row in rows[1:]:
        np.testing.assert_allclose(steps[:64], rows[0][0][:64], atol=1e-5)
        # Later the basis has turned, and its least axes are made of rounding errors.
        np.testing.assert_allclose(steps[64:], rows[0][0][64:], atol=0.03)
        np.testing.assert_allclose(row, rows[0][1], atol=0.03)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of ranks."""
    ranks = [array.ravel().argsort().argsort() for array in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def test_values_order_keys_by_their_frequency_where_nothing_else_counts():
    """Independent steps: the next use of a key of probability p is worth p g / (1 - (1 - p) g), g = exp(-1/life)."""
    layers, experts, top_k, life = 4, 64, 4, 8.0
    random = np.random.default_rng(0)
    popular = 1.2 * random.standard_normal((layers, experts))
    routes = (-popular - random.gumbel(size=(21000, layers, experts))).argsort(-1)[..., :top_k]
    chance = np.stack([np.bincount(routes[:, layer].ravel(), minlength=experts) for layer in range(layers)]) / 21000
    keep = math.exp(-1 / life)
    true = chance * keep / (1 - (1 - chance) * keep)
    values = learn(UseValue(layers=layers, experts=experts), routes[:1000], life)
    got = [correlation(after, true) for after in values[700::50]]
    assert np.mean(got) > 0.93  # the frequencies of all steps reach 0.99
    assert np.abs(values[-1] - true).mean() < 0.1


def test_values_follow_the_state_that_routes_betray():
    """A Markov chain of 12 states, each with its own experts. The true values solve a linear system."""
    layers, experts, top_k, states, life = 2, 32, 2, 12, 4.0
    random = np.random.default_rng(0)
    chances = np.full((states, states), 0.05 / states)
    for state in range(states):
        chances[state, random.permutation(states)[:3]] += [0.57, 0.285, 0.095]
    uses = random.random((states, layers, experts)).argsort(-1)[..., :top_k]
    used = np.zeros((states, layers, experts))
    np.put_along_axis(used, uses, 1, axis=-1)
    true, keep = np.zeros_like(used), math.exp(-1 / life)
    for _ in range(200):
        true = keep * np.tensordot(chances, np.maximum(used, true * (1 - used)), 1)
    path = [0]
    for _ in range(2000):
        path.append(random.choice(states, p=chances[path[-1]]))
    values = learn(UseValue(layers=layers, experts=experts), uses[path], life)
    got = [np.corrcoef(values[n].ravel(), true[path[n]].ravel())[0, 1] for n in range(1200, 2000, 20)]
    mean = true[path].mean(0).ravel()
    without = [np.corrcoef(mean, true[path[n]].ravel())[0, 1] for n in range(1200, 2000, 20)]
    assert np.mean(got) > 0.92
    assert np.mean(got) > np.mean(without) + 0.01  # what frequencies alone could reach, if they were known exactly


@pytest.mark.parametrize(
    "routes",
    [
        uniform(400, layers=2, experts=16, top_k=2),
        loop(400, layers=2, period=16),
        sticky(400, layers=2, experts=16, top_k=2, leave=0.1),
        by_token(400, layers=2, experts=16, top_k=2),
    ],
    ids=["uniform", "loop", "sticky", "token"],
)
def test_values_are_finite_and_hardly_above_one(routes):
    values = learn(UseValue(layers=2, experts=16), routes, 8.0)
    assert values.min() >= np.float32(LEAST)
    assert values.max() < 1.5  # a fit on little may overshoot; nothing is worth more than 1
    assert values[100:].mean() < 1


@pytest.mark.parametrize("life", [2.0, 8.0, 32.0])
def test_a_key_of_every_step_is_worth_a_step_and_one_of_none_the_least(life):
    values = learn(UseValue(layers=2, experts=4), np.tile([[[0, 1], [2, 3]]], (1500, 1, 1)), life)
    expected = np.full((2, 4), LEAST)
    expected[0, :2] = expected[1, 2:] = math.exp(-1 / life)
    np.testing.assert_allclose(values[-1], expected, atol=0.03)


def test_the_layer_that_routes_last_knows_the_values_of_the_steps_end():
    value = UseValue(layers=3, experts=8)
    for rows in by_token(200, layers=3, experts=8, top_k=2).tolist():
        for layer, row in enumerate(rows):
            at_once = value.route(layer, row).copy()
        value.end_step(8.0)
        np.testing.assert_allclose(at_once, value.values[2], atol=1e-5)


def test_an_expert_that_several_sequences_chose_is_one_use():
    once, twice = (UseValue(layers=1, experts=4) for _ in range(2))
    np.testing.assert_array_equal(once.route(0, [1]), twice.route(0, [1, 1]))


@pytest.mark.parametrize("seen", [0, 5000])
def test_a_prompt_moves_frequencies_as_its_tokens_would(seen):
    """As so many steps that all use the same: exactly so for plain means, at first, and for means that decay, later."""
    rows = 40 if seen else 1
    by_prompt, by_steps = (UseValue(layers=1, experts=4) for _ in range(2))
    for value in (by_prompt, by_steps):
        if seen:
            value.prompt(0, np.array([0, 1, 2, 4]) * seen // 4, seen)
    by_prompt.prompt(0, np.array([rows, 0, rows, 0]), rows)
    learn(by_steps, np.tile([[[0, 2]]], (rows, 1, 1)), 8.0)
    np.testing.assert_allclose(by_prompt._frequencies, by_steps._frequencies, atol=1e-5)


# The policy.


SMALL = {"layers": 4, "experts": 32}  # 2 experts a token, so 8 slots are a token cycle


@pytest.mark.parametrize("cache", [8, 32])
def test_it_beats_lru_and_lfu_where_tokens_decide(cache):
    """One token cycle of slots, and a quarter of the experts, once 800 steps have been seen."""
    routes = by_token(1600, top_k=2, **SMALL)
    rate = {name: hits(table(name, cache, **SMALL), routes)[800:].mean() for name in ("lru", "lfu", "next_use")}
    assert rate["next_use"] > max(rate["lru"], rate["lfu"])
    assert rate["next_use"] < clairvoyant(routes[800:], cache, experts=32)


@pytest.mark.parametrize(("layers", "period", "cache"), [(1, 24, 16), (3, 20, 45)])
def test_a_loop_longer_than_the_cache_hits(layers, period, cache):
    """An order of last use always evicts what comes next, and so does one of frequencies that are all the same."""
    shape = {"layers": layers, "experts": period}
    routes = loop(600, layers=layers, period=period)
    for name in ("lru", "lfu"):
        assert hits(table(name, cache, **shape), routes).sum() == 0
    rate = hits(table("next_use", cache, **shape), routes)[300:].mean()
    assert rate > 0.85 * clairvoyant(routes, cache, experts=period)


def test_a_miss_that_is_worth_less_than_every_resident_key_passes_through():
    shape = {"layers": 1, "experts": 64}
    residency, random = table("next_use", 4, **shape), np.random.default_rng(0)
    for _ in range(400):
        residency.policy.on_step([0])
        admission = residency.admit(0, [[0, 1, 2, 3, int(random.integers(4, 64))]])
    assert [expert for expert, _ in admission.staged] == admission.missing
    assert {key for key in residency.key_of if key is not None} == {(0, expert) for expert in range(4)}


ROUTING = {
    "uniform": uniform(1000, top_k=2, **SMALL),
    "sticky": sticky(1000, top_k=2, leave=0.15, **SMALL),
}


@pytest.mark.parametrize("cache", [4, 8, 96])
@pytest.mark.parametrize("routing", ROUTING)
def test_it_loses_nothing_to_lru_where_order_of_use_says_it_all(routing, cache):
    """0.2 points at most, beyond what is chance; from half a token cycle of slots to three quarters of the experts."""
    lru, ours = (hits(table(name, cache, **SMALL), ROUTING[routing]) for name in ("lru", "next_use"))
    gains = (ours - lru)[200:].reshape(-1, 20).mean(1)
    error = gains.std() / math.sqrt(len(gains))
    assert gains.mean() > -0.002 - 2 * error


@pytest.mark.parametrize("cache", [4, 6])
def test_below_a_token_cycle_it_stays_above_half_of_belady(cache):
    """One order of last use over all layers never hits; with floors it does."""
    routes = by_token(600, top_k=2, **SMALL)
    bound = clairvoyant(routes, cache, experts=32)
    alone, with_floors, ours = (table(name, cache, **SMALL) for name in ("lru", "lru", "next_use"))
    alone.policy.floor_share, alone.floors = 0.0, [0] * 4
    assert hits(alone, routes).sum() == 0
    assert hits(with_floors, routes).mean() > bound / 4
    assert hits(ours, routes).mean() > bound / 2


@pytest.mark.parametrize("cache", [4, 13, 40, 64])
def test_layers_keep_their_floors(cache):
    """All misses are in layer 0 for a while; the other layers keep a quarter of an equal share each."""
    residency, random = table("next_use", cache, layers=4, experts=32), np.random.default_rng(0)
    for _ in range(100):
        step(residency, [[random.permutation(32)[:4].tolist()] for _ in range(4)])
    assert sum(residency.count) == cache
    for _ in range(200):
        step(residency, [[random.permutation(32)[:4].tolist()], *[[[0, 1, 2, 3]]] * 3])
        assert all(count >= floor for count, floor in zip(residency.count, residency.floors, strict=True))
    share, extra = divmod(cache, 4)
    assert residency.floors == [(share + (layer < extra)) // 4 for layer in range(4)]


def test_two_runs_decide_the_same():
    routes, shape = by_token(300, layers=3, experts=16, top_k=2), {"layers": 3, "experts": 16}
    runs = [table("next_use", 12, **shape) for _ in range(2)]
    for rows in routes.tolist():
        for layer, row in enumerate(rows):
            if not layer:
                for run in runs:
                    run.policy.on_step([0])
            assert runs[0].admit(layer, [row]) == runs[1].admit(layer, [row])
        np.testing.assert_array_equal(runs[0].slot_of, runs[1].slot_of)


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "cache", "batch"),
    [
        (3, 1, 1, 2, 1),
        (1, 8, 2, 3, 1),
        (2, 4, 4, 3, 1),
        (1, 1, 1, 0, 2),
        (3, 8, 2, 0, 1),
        (3, 8, 3, 9, 4),
        (2, 4, 2, 8, 4),
    ],
)
def test_shapes_at_the_edges(layers, experts, top_k, cache, batch):
    """One expert, one layer, every expert used, no slots, several sequences that share experts, a slot for each."""
    residency, random = table("next_use", cache, layers=layers, experts=experts), np.random.default_rng(0)
    asked = set()
    for count in range(150):
        rows = [[random.permutation(experts)[:top_k].tolist() for _ in range(batch)] for _ in range(layers)]
        residency.policy.on_step([0] * batch)
        for layer, row in enumerate(rows):
            needed = {expert for each in row for expert in each}
            asked |= {(layer, expert) for expert in needed}
            held = {expert for expert in needed if residency.slot_of[layer, expert] >= 0}
            admission = residency.admit(layer, row)
            assert admission.hits == len(held)
            assert set(admission.missing) == needed - held
        if count == 70:
            for layer in range(layers):
                residency.policy.on_prompt(layer, random.integers(0, 9, experts))
    assert sum(residency.count) == min(cache, len(asked))
    assert np.isfinite(residency.policy._value.values).all()


def test_a_prompt_of_nothing_and_steps_without_routes_change_nothing():
    residency = table("next_use", 3, layers=2, experts=4)
    step(residency, [[[0, 1]], [[1, 2]]])
    residency.policy.on_step([0])
    before = residency.policy._value.values.copy()
    for layer in range(2):
        residency.policy.on_prompt(layer, np.zeros(4, np.int64))
    residency.policy.on_step([0])
    residency.policy.on_step([0])
    np.testing.assert_array_equal(residency.policy._value.values, before)
