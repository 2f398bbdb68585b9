"""The correction token by token, in chunks and all at once is one and the same; it starts from the pre-gate order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax.errors import InputError
from ef_jax.nn import correction as nn
from ef_jax.nn.correction_parallel import TokenInputs, correct_tokens, targets

L, E, K, H, V, B = 4, 8, 2, 3, 11, 2
SPEC = nn.CorrectionSpec(layers=L, experts=E, top_k=K, distances=H, vocab=V, width=6)


@pytest.fixture(scope="module")
def module() -> nn.Correction:
    """All leaves random, so that every input matters."""
    made = nn.Correction(SPEC, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for name in ("tokens", "experts", *nn.SourceLeaves._fields):
        leaf = getattr(made, name)
        leaf.set_value(jnp.asarray(0.5 * random.standard_normal(leaf.shape), jnp.float32))
    return made


def sequence(steps: int, seed: int = 0) -> Any:
    """Tokens `[B, T]`, experts `[B, T, L, K]` and choice scores `[B, T, L, H, E]`."""
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((B, steps, L, E)))[..., :K].astype(np.int32)
    choice = random.standard_normal((B, steps, L, H, E)).astype(np.float32)
    return random.integers(0, V, (B, steps), np.int32), ids, choice


def source(module: nn.Correction, index: int) -> nn.SourceLeaves:
    return jax.tree.map(lambda leaf: leaf[index], module.sources)


def step(module: nn.Correction, state: Any, tokens: Any, ids: Any, choice: Any) -> Any:
    """One step of decoding; the state and log-odds `[B, L, H, E]`."""
    return run_step(module.common, module.sources, state, tokens, ids, choice)


@jax.jit
def run_step(common: Any, sources: Any, state: Any, tokens: Any, ids: Any, choice: Any) -> Any:
    state, out = nn.begin(SPEC, common, tokens, state), []
    for layer in range(L):
        leaves = jax.tree.map(lambda leaf: leaf[layer], sources)  # noqa: B023
        out.append(nn.correct(SPEC, leaves, choice[:, layer], state))
        state = nn.advance(SPEC, common, state, jnp.int32(layer), ids[:, layer])
    return state, jnp.stack(out, axis=1)


def test_steps_equal_all_tokens_at_once(module: nn.Correction) -> None:
    tokens, ids, choice = sequence(5)
    counts = np.zeros((B, len(SPEC.decays), L, E), np.float32)
    decays = np.array(SPEC.decays, np.float32)[None, :, None, None]
    before = np.full((B, L, K), -1, np.int32)
    state = jnp.zeros((B, SPEC.state_width))
    at_once = jax.jit(functools.partial(correct_tokens, SPEC))
    for t in range(5):
        state, got = step(module, state, tokens[:, t], ids[:, t], choice[:, t])
        inputs = TokenInputs(*map(jnp.asarray, (tokens[:, t], ids[:, t], before, counts, choice[:, t])))
        expected = at_once(module.common, module.sources, inputs)
        np.testing.assert_allclose(got, expected, atol=2e-5)
        used = np.zeros((B, L, E), np.float32)
        np.put_along_axis(used, ids[:, t], 1, axis=2)
        counts, before = decays * counts + (1 - decays) * used[:, None], ids[:, t]


def test_a_prompt_in_chunks_leaves_the_state_of_its_steps(module: nn.Correction) -> None:
    tokens, ids, choice = sequence(6, seed=1)
    lengths = (6, 2)  # the second prompt ends within the first chunk
    padded = ids.copy()
    padded[1, 2:] = -1
    state = jnp.zeros((B, SPEC.state_width))
    absorb = jax.jit(functools.partial(nn.absorb, SPEC))
    for part in (slice(0, 3), slice(3, 6)):
        for layer in range(L):
            state = absorb(module.common, state, np.int32(layer), padded[:, part, layer])
    for b, length in enumerate(lengths):
        stepped = jnp.zeros((B, SPEC.state_width))
        for t in range(length):
            stepped, _ = step(module, stepped, tokens[:, t], ids[:, t], choice[:, t])
        _, expected = step(module, stepped, tokens[:, 0], ids[:, 0], choice[:, 0])
        _, got = step(module, state, tokens[:, 0], ids[:, 0], choice[:, 0])
        np.testing.assert_allclose(got[b], expected[b], atol=2e-5)


def test_an_inactive_sequence_keeps_its_past_and_counts(module: nn.Correction) -> None:
    tokens, ids, choice = sequence(1)
    state, _ = step(module, jnp.zeros((B, SPEC.state_width)), tokens[:, 0], ids[:, 0], choice[:, 0])
    silent = jnp.full((B, K), -1)
    after = nn.advance(SPEC, module.common, state, jnp.int32(1), silent)
    np.testing.assert_array_equal(after[:, 1:], state[:, 1:])


def test_a_fresh_correction_keeps_the_order_of_the_scores_and_the_base_rate() -> None:
    fresh = nn.Correction(SPEC, rngs=nnx.Rngs(0))
    _, _, choice = sequence(1)
    state = jnp.zeros((B, SPEC.state_width))
    out = nn.correct(SPEC, source(fresh, 1), jnp.asarray(choice[:, 0, 1]), state)
    np.testing.assert_array_equal(np.argsort(out), np.argsort(choice[:, 0, 1]))
    assert abs(float(jax.nn.sigmoid(out).mean()) - K / E) < 0.1


def test_masked_scores_are_low_and_nan_stays_nan(module: nn.Correction) -> None:
    choice = jnp.asarray(sequence(1)[2][:, 0, 1])
    state = jnp.zeros((B, SPEC.state_width))
    masked = nn.standardise(choice.at[:, :, 0].set(-jnp.inf))
    assert bool((masked[:, :, 0] == masked.min()).all())
    assert bool(jnp.isfinite(masked).all())
    out = nn.correct(SPEC, source(module, 1), choice.at[0, 0, 0].set(jnp.nan), state)
    assert bool(jnp.isnan(out[0]).all())
    assert bool(jnp.isfinite(out[1]).all())


def test_targets_are_the_experts_of_coming_layers() -> None:
    _, ids, _ = sequence(1)
    got = np.asarray(targets(jnp.asarray(ids[:, 0]), E, H))
    for b, s, h in np.ndindex(B, L, H):
        expected = set(ids[b, 0, s + h].tolist()) if s + h < L else set()
        assert set(np.flatnonzero(got[b, s, h]).tolist()) == expected


def test_shapes_of_one_source_and_its_columns(module: nn.Correction) -> None:
    common, one = nn.leaf_shapes(SPEC)
    assert jax.tree.map(lambda leaf: leaf.shape, one) == jax.tree.map(jnp.shape, source(module, 0))
    assert jax.tree.map(lambda leaf: leaf.shape, common) == jax.tree.map(jnp.shape, module.common)
    assert SPEC.columns["previous"].stop == one.enter.shape[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"top_k": 9}, "for 9 experts a token needs as many, got 8"),
        ({"decays": (0.5, 1.0)}, "from 0 to below 1, got"),
        ({"decays": ()}, "one or more numbers"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    sizes = {"layers": L, "experts": E, "top_k": K, "distances": H, "vocab": V} | change
    with pytest.raises(InputError, match=message):
        nn.CorrectionSpec(**sizes)
