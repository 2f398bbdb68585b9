"""Attention over the cache: what is seen, what is written, and that blocking and company change no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax import nn
from ef_jax.spec import LayerSpec

# As the engine runs them; one by one, their operations would each be compiled.
attend, write_cache = jax.jit(nn.attend, static_argnames="scale"), jax.jit(nn.write_cache)
ALL = jnp.asarray(nn.reach_of())


def inputs(tokens: int, context: int, *, heads: int = 4, kv_heads: int = 2, dtype: str = "float32", batch: int = 2):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, tokens, heads, 8), dtype)
    k, v = (jax.random.normal(key, (batch, kv_heads, context, 8), dtype) for key in keys[1:])
    return q, k, v


def within(window: int = 2**30, chunk: int = 2**30) -> jax.Array:
    return jnp.asarray([window, chunk], jnp.int32)


def naive(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    window: int = 2**30,
    chunk: int = 2**30,
    sinks: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """One query and one head at a time, in float64, over the visible keys only."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        p = positions[b, t]
        seen = slice(max(0, p - window + 1, p // chunk * chunk), p + 1)
        scores = k[b, h // group, seen].astype(np.float64) @ q[b, t, h] * (scale or q.shape[-1] ** -0.5)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(np.float64(sinks[h])))
        out[b, t, h] = weights @ v[b, h // group, seen] / total
    return out


@pytest.mark.parametrize("window", [1, 3, 2**30])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("tokens", [1, 5, 64, 70])
def test_against_one_query_at_a_time(tokens: int, heads: int, window: int) -> None:
    q, k, v = inputs(tokens, 80, heads=heads)
    positions = np.stack([np.arange(tokens), np.arange(tokens)[::-1] + 9]).astype(np.int32)
    out = attend(q, k, v, jnp.asarray(positions), within(window))
    np.testing.assert_allclose(out, naive(*map(np.asarray, (q, k, v)), positions, window), atol=2e-6)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("tokens", [1, 70])
def test_chunks_sinks_scale_and_narrow_values(tokens: int, heads: int) -> None:
    q, k, v = inputs(tokens, 80, heads=heads)
    v = v[..., :6]
    positions = np.stack([np.arange(tokens), np.arange(tokens)[::-1] + 9]).astype(np.int32)
    sinks = np.linspace(-2, 4, heads, dtype=np.float32)
    out = attend(q, k, v, jnp.asarray(positions), within(9, 16), scale=0.5, sinks=jnp.asarray(sinks))
    expected = naive(*map(np.asarray, (q, k, v)), positions, 9, 16, sinks, 0.5)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_reach_of_a_layer() -> None:
    assert nn.reach_of(LayerSpec(ffn="moe", window=5, chunk=8)).tolist() == [5, 8]
    assert nn.reach_of(LayerSpec(ffn="moe")).tolist() == nn.reach_of().tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_give_the_bits_of_one_call_a_block(dtype: str) -> None:
    q, k, v = inputs(150, 160, dtype=dtype)
    positions = jnp.broadcast_to(jnp.arange(150, dtype=jnp.int32), (2, 150))
    whole = attend(q, k, v, positions, within(40))
    for start in (0, 64):
        part = slice(start, start + nn.QUERY_BLOCK)
        alone = attend(q[:, part], k, v, positions[:, part], within(40))
        np.testing.assert_array_equal(whole[:, part], alone)


def test_blocks_bound_the_workspace() -> None:
    q, k, v = inputs(512, 512, batch=1)
    positions = jnp.arange(512, dtype=jnp.int32)[None]
    memory = attend.lower(q, k, v, positions, ALL).compile().memory_analysis()
    scores = 4 * 512 * 512 * 4  # bytes of all the scores at once
    assert memory.temp_size_in_bytes < scores / 2


def test_a_lone_bfloat16_row_is_padded_without_effect() -> None:
    q, k, v = inputs(1, 32, heads=2, dtype="bfloat16")
    positions = jnp.asarray([[7], [31]], jnp.int32)
    out = attend(q, k, v, positions, ALL)
    expected = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), np.asarray(positions))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 4, 2), (3, 1, 8, 2), (8, 1, 4, 4), (2, 16, 8, 2), (1, 100, 4, 2)])
def test_unseen_blocks_of_keys_change_no_bit(shape: tuple[int, int, int, int], dtype: str) -> None:
    batch, tokens, heads, kv_heads = shape
    q, k, v = inputs(tokens, 4 * nn.KEY_BLOCK, heads=heads, kv_heads=kv_heads, dtype=dtype, batch=batch)
    last = np.random.default_rng(1).integers(tokens - 1, nn.KEY_BLOCK, (batch, 1))
    positions = jnp.asarray(last - np.arange(tokens)[::-1], jnp.int32)
    spans = [nn.KEY_BLOCK * blocks for blocks in (1, 2, 3, 4)]
    least, *others = (attend(q, k[:, :, :n], v[:, :, :n], positions, ALL) for n in spans)
    for other in others:
        np.testing.assert_array_equal(other, least)


def test_sequences_find_their_rows_of_the_cache() -> None:
    _, k, _ = inputs(2, 8, batch=4)
    new, positions = jnp.ones((2, 2, 2, 8)), jnp.asarray([[3, 4], [5, -1]], jnp.int32)
    written = np.asarray(write_cache(k, new, positions, jnp.asarray([2, 0], jnp.int32)))
    changed = np.argwhere((written != np.asarray(k)).any((1, 3))).tolist()
    assert changed == [[0, 5], [2, 3], [2, 4]]
    dropped = write_cache(k, new, positions, jnp.asarray([4, 4], jnp.int32))
    np.testing.assert_array_equal(dropped, k)


@pytest.mark.parametrize("power", [88.0, 2.5, 0.0, -1e-6, -0.3, -50.0, -87.0])
def test_exponential(power: float) -> None:
    np.testing.assert_allclose(nn.invariant_exp(jnp.float32(power)), np.exp(np.float32(power)), rtol=1e-6)
    assert nn.invariant_exp(jnp.float32(-1e30)) < 2e-38


def test_padding_is_finite_and_touches_nothing() -> None:
    q, k, v = inputs(3, 8)
    positions = jnp.asarray([[0, 1, 2], [-1, 0, -1]], jnp.int32)
    out = attend(q, k, v, positions, ALL)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[1, 1], v[1, :, 0].repeat(2, axis=0))  # it sees its own position only
    new = jnp.ones((2, 3, 2, 8))
    written = np.asarray(write_cache(k, new, positions))
    changed = (written != np.asarray(k)).any((1, 3))
    np.testing.assert_array_equal(changed, [[True] * 3 + [False] * 5, [True] + [False] * 7])


def test_positions_beyond_the_cache_are_dropped() -> None:
    _, k, _ = inputs(1, 8)
    written = write_cache(k, jnp.ones((2, 1, 2, 8)), jnp.asarray([[8], [2**30]], jnp.int32))
    np.testing.assert_array_equal(written, k)


@pytest.mark.parametrize("rows", [1, 3, 8, 65])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(rows: int, dtype: str) -> None:
    keys = jax.random.split(jax.random.key(rows), 3)
    x, weight, bias = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, [(rows, 24), (40, 24), (40,)], strict=True)
    )
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    out = nn.linear(x, weight, bias)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-5
    )
