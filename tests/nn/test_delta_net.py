"""Gated DeltaNet: the rule in both its forms, and that company, rows, padding and a second attempt change no bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax.nn.delta_net import GatedDeltaNet, delta_net_cache
from ef_jax.nn.delta_rule import delta_chunks, delta_step, unit_lower_inverse, unit_vectors
from ef_jax.nn.gates import sigmoid, silu, softplus
from ef_jax.spec import AttentionSpec, DeltaNetSpec, ExpertSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from tests.cuda import aot

HIDDEN = 32
NET = DeltaNetSpec(key_heads=2, value_heads=4, key_dim=8, value_dim=12, conv_width=4, fused=True)
REACH = np.full(2, 2**30, np.int32)
Cache = tuple[jax.Array, ...]


def spec_of(dtype: str, net: DeltaNetSpec = NET, hidden: int = HIDDEN) -> ModelSpec:
    return ModelSpec(
        family="qwen3_next",
        vocab=8,
        hidden=hidden,
        max_position=256,
        norm_eps=1e-6,
        tie_embeddings=True,
        dtype=dtype,
        layers=(LayerSpec(ffn="moe", mixer="delta_net"),),
        attention=AttentionSpec(heads=2, kv_heads=1, head_dim=8, rope=RopeSpec(theta=1e4, dim=8)),
        router=RouterSpec(),
        experts=ExpertSpec(count=4, top_k=2, width=8),
        delta_net=net,
    )


@functools.cache
def parts(dtype: str) -> tuple[Any, Any]:
    """Graph definition and random state of the module."""
    graphdef, state = nnx.split(GatedDeltaNet(spec_of(dtype), NET, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [0.4 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return graphdef, jax.tree.unflatten(tree, random)


@functools.cache
def program(dtype: str) -> Any:
    graphdef, state = parts(dtype)
    return jax.jit(
        lambda x, cache, positions, rows: nnx.merge(graphdef, state)(
            x, cache, positions, jnp.asarray(REACH), None, rows
        )
    )


def call(x: Any, cache: Cache, positions: Any, rows: Any = None) -> tuple[np.ndarray, Cache]:
    out, cache = program(str(x.dtype))(x, cache, jnp.asarray(positions, jnp.int32), rows)
    return np.asarray(out.astype(jnp.float32)), cache


def empty(rows: int, dtype: str = "float32") -> Cache:
    return tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in delta_net_cache(spec_of(dtype), NET, rows))


def tokens(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, HIDDEN), dtype)


def span(start: int, count: int, width: int | None = None) -> np.ndarray:
    """Positions of `count` tokens from `start`, then padding."""
    places = np.full(count if width is None else width, -1, np.int32)
    places[:count] = np.arange(start, start + count)
    return places


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def rule_inputs(count: int, kind: str) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    both = random.normal(size=(2, 2, 2, count, 8)).astype("f")
    query, key = np.array(unit_vectors(jnp.asarray(both)))
    value = random.normal(size=(2, 2, 3, count, 5)).astype("f")
    rate = random.uniform(0, 1, (2, 2, 3, count)).astype("f")
    decay = -random.exponential(size=rate.shape).astype("f")
    if kind == "one token again and again":  # the changes cancel: powers of the system overflow float32's digits
        key[:], rate[:], decay[:] = key[:, :, :1], 0.999, -1e-4
    if kind == "forgets":
        decay *= 1000
    return [query, key, value, rate, decay, random.normal(size=(2, 2, 3, 8, 5)).astype("f")]


def naive(query, key, value, rate, decay, state):  # type: ignore[no-untyped-def]
    """The recurrence as written, token by token in float64."""
    out, state = np.zeros(value.shape), state.astype(np.float64)
    for t in range(key.shape[2]):
        k, q = (x[:, :, None, t].astype(np.float64) for x in (key, query))
        state = state * np.exp(decay[..., t, None, None].astype(np.float64))
        change = (value[..., t, :] - np.einsum("bngk,bngkv->bngv", k, state)) * rate[..., t, None]
        state = state + k[..., None] * change[..., None, :]
        out[..., t, :] = np.einsum("bngk,bngkv->bngv", q, state)
    return out, state


@pytest.mark.parametrize("kind", ["any", "one token again and again", "forgets"])
@pytest.mark.parametrize("count", [2, 16, 150])
def test_chunks_against_one_token_at_a_time(count: int, kind: str) -> None:
    given = rule_inputs(count, kind)
    out, state = jax.jit(delta_chunks)(*map(jnp.asarray, given))
    expected = naive(*given)
    np.testing.assert_allclose(out, expected[0], atol=5e-6)
    np.testing.assert_allclose(state, expected[1], atol=5e-6)


def test_a_step_against_the_recurrence() -> None:
    query, key, value, rate, decay, state = rule_inputs(1, "any")
    first = (query[:, :, 0], key[:, :, 0], value[..., 0, :], rate[..., 0], decay[..., 0], state)
    out, after = jax.jit(delta_step)(*map(jnp.asarray, first))
    expected = naive(query, key, value, rate, decay, state)
    np.testing.assert_allclose(out, expected[0][..., 0, :], atol=1e-6)
    np.testing.assert_allclose(after, expected[1], atol=1e-6)


def test_inverse_of_unit_triangles() -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32)).astype("f") * 0.3
    full = np.tril(matrix, -1) + np.eye(32)
    np.testing.assert_allclose(unit_lower_inverse(jnp.asarray(matrix)), np.linalg.inv(full), atol=2e-5)


def test_gates() -> None:
    x = jnp.asarray([*np.linspace(-90, 90, 1001), 0, -1e-7, 1e-7, -1e30, 1e30], jnp.float32)
    for ours, theirs in ((sigmoid, jax.nn.sigmoid), (silu, jax.nn.silu), (softplus, jax.nn.softplus)):
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-37 if ours is not silu else 1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_however_a_prompt_is_cut(dtype: str) -> None:
    x = tokens(2, 70, dtype=dtype)
    results = []
    for cuts in ([70], [16] * 4 + [6], [16] * 4 + [1] * 6):
        cache, out, start = empty(2, dtype), [], 0
        for count in cuts:
            width = 16 if count == 6 else count
            given = jnp.pad(x, ((0, 0), (0, 10), (0, 0)))[:, start : start + width]
            part, cache = call(given, cache, np.stack([span(start, count, width)] * 2))
            out.append(part[:, :count])
            start += count
        results.append(np.concatenate(out, axis=1))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_rows_change_no_bit(dtype: str, width: int) -> None:
    x, after = tokens(2, width, dtype=dtype), tokens(2, 1, dtype=dtype, seed=1)
    positions = np.stack([span(0, width)] * 2)
    out, cache = call(x, empty(2, dtype), positions)
    later, cache = call(after, cache, positions[:, :1] + width)
    rows = jnp.asarray([4, 0], jnp.int32)  # of 5, each with what another sequence has left
    _, used = call(tokens(2, 16, dtype=dtype, seed=2), empty(5, dtype), np.stack([span(0, 16)] * 2), rows)
    far, used = call(x, used, positions, rows)
    far_later, used = call(after, used, positions[:, :1] + width, rows)
    same((far, far_later), (out, later))
    for lane in range(2):  # alone, in the other lane
        place = 1 - lane
        alone = np.full((2, width), -1, np.int32)
        alone[place] = positions[lane]
        single, lone = call(x[::-1], empty(2, dtype), alone)
        alone = np.where(alone[:, :1] < 0, -1, alone[:, :1] + width)
        single_later, _ = call(after[::-1], lone, alone)
        same((single[place], single_later[place]), (out[lane], later[lane]))


def test_padding_changes_nothing() -> None:
    x, positions = tokens(2, 16), np.stack([span(0, 10, 16), span(0, 16)])
    out, cache = call(x, empty(2), positions)
    other = x.at[0, 10:].set(100.0)
    again, again_cache = call(other, empty(2), positions)
    assert np.isfinite(again).all()
    same((again[0, :10], again[1], again_cache), (out[0, :10], out[1], cache))
    # A sequence without a token, and one without a row.
    for places, rows in (([[-1], [16]], [0, 1]), ([[-1], [16]], None), ([[10], [16]], [2, 1])):
        rows = None if rows is None else jnp.asarray(rows, jnp.int32)
        out, after = call(tokens(2, 1), cache, places, rows)
        assert np.isfinite(out).all()
        for array, was in zip(after, cache, strict=True):
            same(array[0], was[0])
            assert not np.array_equal(array[1], was[1])


@pytest.mark.parametrize("width", [1, 16])
def test_a_pass_that_comes_again_gives_the_same_bits(width: int) -> None:
    """As after a copy that failed in a later layer; then it goes on as if nothing had been."""
    x = tokens(2, 4, width)
    cache = again_cache = empty(2)
    for step in range(4):
        positions = np.stack([span(step * width, width)] * 2)
        out, cache = call(x[:, step], cache, positions)
        for _ in range(step % 3 + 1):
            again, again_cache = call(x[:, step], again_cache, positions)
            same((again, again_cache), (out, cache))


def test_a_new_sequence_in_a_used_row() -> None:
    """The row's last one has run for as many tokens as the new one's prompt has, and left both versions behind."""
    used = empty(2)
    for start, count, width in ((0, 2, 16), (2, 1, 1)):
        _, used = call(tokens(2, width, seed=start), used, np.stack([span(start, count, width)] * 2))
    fresh = empty(2)
    for start, count, width in ((0, 3, 16), (3, 1, 1), (4, 1, 1)):
        x, positions = tokens(2, width, seed=start + 5), np.stack([span(start, count, width)] * 2)
        out, used = call(x, used, positions)
        expected, fresh = call(x, fresh, positions)
        same(out[:, :count], expected[:, :count])


def test_tokens_after_some_that_never_ran_are_nan() -> None:
    _, cache = call(tokens(2, 16), empty(2), np.stack([span(0, 3, 16)] * 2))
    out, _ = call(tokens(2, 1), cache, [[5], [3]])
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.cuda_compile
@pytest.mark.parametrize(("batch", "width", "rows"), [(1, 1, 1), (4, 1, 4), (4, 1, 6), (2, 128, 6)])
def test_compiles_for_an_h100_without_copies_of_the_states(batch: int, width: int, rows: int) -> None:
    net = DeltaNetSpec(key_heads=4, value_heads=8, key_dim=128, value_dim=128, conv_width=4, fused=True)
    spec = spec_of("bfloat16", net, hidden=256)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GatedDeltaNet(spec, net, rngs=nnx.Rngs(0))))
    abstract = functools.partial(jax.tree.map, lambda leaf: aot.abstract(leaf.shape, leaf.dtype))
    cache = delta_net_cache(spec, net, rows)

    def run(state, x, cache, positions, rows=None):  # type: ignore[no-untyped-def]
        return nnx.merge(graphdef, state)(x, cache, positions, jnp.asarray(REACH), None, rows)

    given = [aot.abstract((batch, width, 256), jnp.bfloat16), abstract(cache), aot.abstract((batch, width), jnp.int32)]
    if rows != batch:
        given.append(aot.abstract((batch,), jnp.int32))
    compiled = aot.compile_for_h100(run, abstract(state), *given, donate_argnums=2)
    text = compiled.as_text()
    shape = ",".join(map(str, cache[1].shape))
    flat = ",".join(map(str, (rows * 2, *cache[1].shape[2:])))
    assert f"f32[{shape}]" in text
    copies = [line for line in text.splitlines() if " copy(" in line and (f"= f32[{shape}]" in line or flat in line)]
    assert copies == []
    if width == 1:
        launches = [line for line in text[text.index("ENTRY") :].splitlines() if " fusion(" in line or "call(" in line]
        assert len(launches) < 26
