"""Gradients of the grouped functions: against the dense layer, finite differences, and what has none."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import (
    ACTIVATIONS,
    UNGATED_ACTIVATIONS,
    ExpertBiases,
    dequantize,
    grouped_ffn,
    lossy_quantize,
    slot_grouped_matmul,
    to_storage,
)
from tests.pallas_kernels.base import assert_close, in_f64

M, D, F, S = 24, 64, 32, 6
SLOTS = np.int32([4, -1, 0, 4, 2])  # two groups share a slot, one is skipped
SIZES = np.int32([5, 3, 0, 9, 4])  # one is empty, three rows are left over
SLOT_OF_ROW = np.array([4] * 5 + [-1] * 3 + [4] * 9 + [2] * 4 + [-1] * 3)


def random(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def dense_ffn(
    x: jax.Array, pool: jax.Array, biases: ExpertBiases | None, out: jax.Array, activation: str = "silu"
) -> jax.Array:
    """The same rows by einsums over gathered weights, for jax to differentiate, in float32."""
    x, weights, slots = x.astype(jnp.float32), pool[SLOT_OF_ROW].astype(jnp.float32), SLOT_OF_ROW
    with jax.default_matmul_precision("highest"):
        last = weights.shape[1] - 1
        projected = [jnp.einsum("md,mfd->mf", x, weights[:, part]) for part in range(last)]
        if biases is not None:
            projected = [of + bias[slots] for of, bias in zip(projected, biases[:2], strict=True)]
        act = (ACTIVATIONS if last == 2 else UNGATED_ACTIVATIONS)[activation]
        y = jnp.einsum("mf,mfd->md", act(*projected), weights[:, last])
    if biases is not None:
        y = y + biases.down[slots]
    return jnp.where(slots[:, None] >= 0, y, out.astype(jnp.float32))


def ours(x: jax.Array, pool: Any, biases: ExpertBiases | None, out: jax.Array, **options: Any) -> jax.Array:
    return grouped_ffn(x, pool, SLOTS, SIZES, biases=biases, out=out, tile_rows=8, **options)


def gradients(function: Any, weights: jax.Array, argnums: tuple[int, ...] = (0, 1), *, allow_int: bool = False) -> Any:
    """Compiled: of the sum of results times weights."""

    def loss(*arguments: Any) -> jax.Array:
        return jnp.sum(function(*arguments).astype(jnp.float32) * weights)

    return jax.jit(jax.grad(loss, argnums=argnums, allow_int=allow_int))


def arguments(dtype: Any, *, biased: bool) -> tuple[jax.Array, jax.Array, ExpertBiases | None, jax.Array]:
    biases = ExpertBiases(random((S, F), 3), random((S, F), 4), random((S, D), 5)) if biased else None
    return random((M, D), 1, dtype), random((S, 3, F, D), 2, dtype, 0.2), biases, random((M, D), 6, dtype)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize(("activation", "biased"), [("silu", False), ("clamped_swiglu", True)])
def test_equal_those_of_the_dense_layer(backend: str, activation: str, biased: bool) -> None:
    given, weights = arguments(jnp.float32, biased=biased), random((M, D), 7)
    which = tuple(place for place, argument in enumerate(given) if argument is not None)
    run = functools.partial(ours, activation=activation, implementation=backend)
    got = gradients(run, weights, which)(*given)
    expected = gradients(functools.partial(dense_ffn, activation=activation), weights, which)(*given)
    for ours_one, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(ours_one, in_f64(theirs), 1e-5)
    assert (got[1][np.int32([0, 1, 3, 5])] == 0).all()


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_of_blocks_without_a_gate(backend: str) -> None:
    x, pool, _, out = arguments(jnp.float32, biased=False)
    given, weights = (x, pool[:, :2], None, out), random((M, D), 7)
    run = functools.partial(ours, activation="gelu_tanh", implementation=backend)
    got = gradients(run, weights, (0, 1, 3))(*given)
    expected = gradients(functools.partial(dense_ffn, activation="gelu_tanh"), weights, (0, 1, 3))(*given)
    for ours_one, theirs in zip(got, expected, strict=True):
        assert_close(ours_one, in_f64(theirs), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_of_16_bit_rows_are_near_the_exact_ones(dtype: str) -> None:
    x, pool, _, out = arguments(dtype, biased=False)
    weights = random((M, D), 7)
    got = gradients(ours, weights, (0, 1, 3))(x, pool, None, out)
    wide = (x.astype(jnp.float32), pool.astype(jnp.float32), None, out.astype(jnp.float32))
    expected = gradients(dense_ffn, weights, (0, 1, 3))(*wide)
    for ours_one, theirs in zip(got, expected, strict=True):
        assert ours_one.dtype == dtype
        assert_close(ours_one, in_f64(theirs), 2e-2 if dtype == "bfloat16" else 3e-3)


def test_agree_with_finite_differences() -> None:
    x, pool, biases, out = arguments(jnp.float32, biased=True)
    run = jax.jit(functools.partial(ours, activation="gelu_tanh"))
    check_grads(run, (x, pool, biases, out), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_of_the_plain_matmul(transposed: bool, backend: str) -> None:
    x, out, weights = random((M, D), 1), random((M, F), 2), random((M, F), 3)
    pool = random((S, F, D) if transposed else (S, D, F), 4, scale=0.2)

    def run(x: jax.Array, pool: jax.Array, out: jax.Array) -> jax.Array:
        return slot_grouped_matmul(
            x, pool, SLOTS, SIZES, transposed=transposed, out=out, tile_rows=8, implementation=backend
        )

    def dense(x: jax.Array, pool: jax.Array, out: jax.Array) -> jax.Array:
        y = jnp.einsum("mc,mnc->mn" if transposed else "mc,mcn->mn", x, pool[SLOT_OF_ROW], precision="highest")
        return jnp.where(SLOT_OF_ROW[:, None] >= 0, y, out)

    got = gradients(run, weights, (0, 1, 2))(x, pool, out)
    expected = gradients(dense, weights, (0, 1, 2))(x, pool, out)
    for ours_one, theirs in zip(got, expected, strict=True):
        assert_close(ours_one, in_f64(theirs), 1e-5)


def test_of_groups_of_one_row() -> None:
    x, pool, weights = random((5, D), 1), random((S, 3, F, D), 2, scale=0.2), random((5, D), 3)
    slots = np.int32([3, -1, 0, 3, 5])

    def run(sizes: np.ndarray | None, x: jax.Array, pool: jax.Array) -> jax.Array:
        return grouped_ffn(x, pool, slots, sizes, tile_rows=8)

    short = gradients(functools.partial(run, None), weights)(x, pool)
    long = gradients(functools.partial(run, np.ones(5, np.int32)), weights)(x, pool)
    for ours_one, theirs in zip(short, long, strict=True):
        assert_close(ours_one, in_f64(theirs), 1e-6)
    assert (short[0][1] == 0).all()


def test_what_rows_of_no_group_hold_reaches_no_gradient() -> None:
    x, pool, _, out = arguments(jnp.float32, biased=False)
    unused = jnp.asarray(SLOT_OF_ROW < 0)[:, None]
    compute = gradients(ours, random((M, D), 7))
    clean = compute(x, pool, None, out)
    poisoned = compute(jnp.where(unused, jnp.nan, x), pool.at[1].set(jnp.nan), None, out)
    for ours_one, theirs in zip(poisoned, clean, strict=True):
        assert np.array_equal(ours_one, theirs)


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_a_quantized_pool_has_none_but_its_rows_have(format: Any) -> None:
    x, pool, _, out = arguments(jnp.float32, biased=False)
    quantized, weights = lossy_quantize(pool, format), random((M, D), 7)
    of_x, of_pool = gradients(ours, weights, allow_int=True)(x, quantized, None, out)
    (expected,) = gradients(dense_ffn, weights, (0,))(x, dequantize(quantized), None, out)
    assert_close(of_x, in_f64(expected), 1e-5)
    assert of_pool.values.dtype == jax.dtypes.float0


def test_a_pool_of_bits_has_none_but_its_rows_have() -> None:
    x, pool, _, out = arguments(jnp.bfloat16, biased=False)
    weights = random((M, D), 7)
    of_x, of_pool = gradients(ours, weights, allow_int=True)(x, to_storage(pool), None, out)
    assert of_pool.dtype == jax.dtypes.float0
    assert np.array_equal(in_f64(of_x), in_f64(gradients(ours, weights, (0,))(x, pool, None, out)[0]))


def test_a_pool_that_is_not_asked_about_costs_nothing() -> None:
    given = arguments(jnp.float32, biased=False)
    sums = f"f32[{S},{F},{D}]"
    compiled = {
        which: gradients(ours, jnp.ones((M, D)), which).lower(*given).compile().as_text() for which in ((0,), (0, 1))
    }
    assert sums in compiled[0, 1]
    assert sums not in compiled[0,]
