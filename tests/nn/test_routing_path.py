"""A routing path decoded token by token is the one computed for all tokens at once, and nothing leaks between rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

from ef_jax.errors import InputError
from ef_jax.nn.routing_path import UNKNOWN, RoutingPath, RoutingPathSpec, decode, empty_state, join
from ef_jax.nn.t5 import BUCKETS, both_ways, buckets

SPEC = RoutingPathSpec(
    layers=3, experts=8, top_k=2, vocab=16, d_model=8, d_ff=16, heads=2, decoder_layers=2, most_prompt=8, window=6
)
TOKENS = 20


def random_path(spec: RoutingPathSpec = SPEC) -> RoutingPath:
    """One whose every parameter counts."""
    path = RoutingPath(spec, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    for _, node in nnx.iter_graph(path):
        if isinstance(node, nnx.Param):
            value = node.get_value()
            node.set_value(value + jnp.asarray(0.3 * random.standard_normal(value.shape), value.dtype))
    return path


@pytest.fixture(scope="module")
def path() -> RoutingPath:
    return random_path()


@pytest.fixture(scope="module")
def given() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, one full, one partly, one empty; their lengths; and generated tokens."""
    random = np.random.default_rng(2)
    prompts, tokens = random.integers(0, 16, (3, 8), np.int32), random.integers(0, 16, (3, TOKENS), np.int32)
    return prompts, np.array([8, 3, 0], np.int32), tokens


@jax.jit
def all_at_once(path: RoutingPath, *given: Array) -> Array:
    return path(*given)


def whole(path: RoutingPath, *given: np.ndarray) -> np.ndarray:
    return np.asarray(all_at_once(path, *map(jnp.asarray, given)))


def stepwise(path: RoutingPath, given: tuple[np.ndarray, ...], context: int) -> np.ndarray:
    """By `decode`, in rows 4, 0 and 2 of 5, between rows of padding."""
    graph, leaves = nnx.split(path)

    @jax.jit
    def step(leaves: nnx.State, state: Array, rows: Array, tokens: Array) -> Array:
        return decode(nnx.merge(graph, leaves), state, rows, tokens)

    state = empty_state(path.spec, rows=5, context=context)
    rows = np.array([4, 9, 0, 2, 5], np.int32)
    for row, prompt, length in zip((4, 0, 2), *given[:2], strict=True):
        state = join(path, state, jnp.int32(row), jnp.asarray(prompt), jnp.asarray(length))
    out = []
    for column in given[2].T:
        tokens = np.array([column[0], 3, column[1], column[2], 3], np.int32)
        odds, state = step(leaves, state, rows, tokens)
        out.append(np.asarray(odds)[[0, 2, 3]])
    assert np.asarray(state.positions).tolist() == [TOKENS, 0, TOKENS, 0, TOKENS]
    assert not np.asarray(state.recent)[:, [1, 3]].any()
    return np.stack(out, axis=1)


def test_token_by_token_is_all_at_once(path: RoutingPath, given: tuple[np.ndarray, ...]) -> None:
    np.testing.assert_allclose(stepwise(path, given, TOKENS), whole(path, *given), atol=1e-5, rtol=1e-5)


def test_a_short_context_is_a_short_window(path: RoutingPath, given: tuple[np.ndarray, ...]) -> None:
    short = RoutingPath(dataclasses.replace(SPEC, window=4), rngs=nnx.Rngs(0))
    nnx.update(short, nnx.state(path))
    np.testing.assert_allclose(stepwise(path, given, 4), whole(short, *given), atol=1e-5, rtol=1e-5)


def test_nothing_is_read_that_cannot_be_known(path: RoutingPath, given: tuple[np.ndarray, ...]) -> None:
    prompts, lengths, tokens = given
    before = whole(path, *given)
    later, past_end = tokens.copy(), prompts.copy()
    later[:, 10:] += 1
    later %= 16
    past_end[1, 3:], past_end[2] = 5, 7
    after = whole(path, past_end, lengths, later)
    np.testing.assert_allclose(after[:, :10], before[:, :10], atol=1e-5)
    assert (np.abs(after[:, 10] - before[:, 10]).max(axis=(1, 2)) > 1e-2).all()
    # Two layers of a window of 6 reach ten tokens back, and a prompt reaches everything.
    earlier = tokens.copy()
    earlier[:, 0] = (earlier[:, 0] + 1) % 16
    reached = np.abs(whole(path, prompts, lengths, earlier) - before).max(axis=(0, 2, 3))
    assert (reached[:11] > 1e-4).all()
    assert (reached[11:] < 1e-5).all()
    prompts = prompts.copy()
    prompts[1, 2] = (prompts[1, 2] + 1) % 16
    told = np.abs(whole(path, prompts, lengths, tokens) - before).max(axis=(2, 3))
    assert (told[1] > 1e-5).all()
    assert not told[[0, 2]].any()


def test_ids_outside_the_vocabulary_are_unknown(path: RoutingPath) -> None:
    ids = jnp.array([UNKNOWN, 16, 99, 3], jnp.int32)
    embedded = np.asarray(path.embed(ids))
    np.testing.assert_array_equal(embedded[:3], np.broadcast_to(path.unknown[...], (3, 8)))
    assert (embedded[3] != embedded[0]).any()


def test_a_fresh_path_predicts_the_same_for_ids_that_it_has_not_learned() -> None:
    fresh = RoutingPath(SPEC, rngs=nnx.Rngs(0))
    embedded = np.asarray(fresh.embed(jnp.arange(16)))
    np.testing.assert_array_equal(embedded, np.broadcast_to(embedded[0], (16, 8)))


def test_kinds_of_distances_are_exact_near_by_and_never_fall() -> None:
    kinds = np.asarray(buckets(jnp.arange(2000)))
    assert kinds[:16].tolist() == list(range(16))
    assert (np.diff(kinds) >= 0).all()
    assert set(np.diff(kinds)) <= {0, 1}
    assert kinds[-1] == kinds[300] == BUCKETS - 1
    assert np.asarray(both_ways(jnp.array([3, 0, -3]))).tolist() == [3, 0, BUCKETS + 3]


def test_what_cannot_be_built() -> None:
    for change, message in (
        ({"vocab": 0}, "vocab must be at least 1, got 0"),
        ({"encoder_layers": -1}, "encoder_layers must be at least 0, got -1"),
        ({"top_k": 9}, "9 experts a token needs as many, got 8"),
        ({"heads": 3}, "d_model must be a multiple of its 3 heads: 8"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(SPEC, **change)
