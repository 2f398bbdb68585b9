"""Gradients of the two public functions, whichever backend runs them: matmuls and outer products over the same groups.

Nothing of the forward pass is kept but its arguments: the backward pass computes both projections again, which is two
of its eight matmuls, and saves `[M, F]` arrays. Gradients are rounded to the rows' dtype before they are multiplied, as
activations are; sums are float32.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.grouped_ffn.activations import activation_of
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.backends import choose_backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.quantized import QuantizedPool
from pallas_kernels.grouped_ffn.storage import Pool
from pallas_kernels.grouped_ffn.work_items import slot_of_row


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable_ffn(
    backend: Backend,
    problem: Problem,
    x: Float[Array, "M D"],
    pool: Pool,
    biases: ExpertBiases | None,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
) -> Float[Array, "M D"]:
    """`backend.ffn`, with gradients for x, a pool of floats, biases and out.

    Slots that no row uses have zero gradients; slots that several groups use, the sum of theirs. A pool of bits or of
    quantized blocks has none.
    """
    return backend.ffn(x, pool, biases, slot_of_group, group_sizes, out, problem)


def _ffn_forward(backend: Backend, problem: Problem, *arguments: Any) -> tuple[jax.Array, tuple]:
    return differentiable_ffn(backend, problem, *arguments), arguments[:-1]


def _ffn_backward(backend: Backend, problem: Problem, kept: tuple, dy: Float[Array, "M D"]) -> tuple:
    x, pool, biases, slot_of_group, group_sizes = kept
    rows, hidden, width = problem.rows, problem.contract, problem.width
    inward = dataclasses.replace(problem, activation=None, biased=False)
    outward = dataclasses.replace(inward, contract=width, width=hidden)
    slots = slot_of_row(slot_of_group, group_sizes, rows)
    valid = slots[:, None] >= 0

    def times(part: int, of: jax.Array, *, contract_last: bool) -> jax.Array:
        wanted = inward if contract_last else outward
        return _product(backend, wanted, of, pool, slot_of_group, group_sizes, part, contract_last=contract_last)

    with jax.named_scope("grouped_ffn_gradients"):
        projected = [times(part, x, contract_last=True) for part in range(problem.down_part)]
        if biases is not None:
            projected = [
                of + jnp.where(valid, bias[slots].astype(jnp.float32), 0.0)
                for of, bias in zip(projected, biases[:2], strict=True)
            ]
        inner, pull = jax.vjp(activation_of(problem), *projected)
        dprojected = pull(times(problem.down_part, dy, contract_last=True))
        rounded = [each.astype(x.dtype) for each in dprojected]
        dx = functools.reduce(operator.add, (times(part, of, contract_last=False) for part, of in enumerate(rounded)))
        dpool = None
        if not isinstance(pool, QuantizedPool) and jnp.issubdtype(pool.dtype, jnp.floating):
            sums = functools.partial(_sums, backend, inward, slot_of_group, group_sizes)
            pairs = (*((each, x) for each in rounded), (inner.astype(x.dtype), dy))
            dpool = jnp.zeros(pool.shape, pool.dtype)
            for part, (a, b) in enumerate(pairs):
                a, dpool = jax.lax.optimization_barrier((a, dpool))  # one part's float32 sums at a time
                dpool = dpool.at[:, part].set(sums(a, b).astype(pool.dtype))
        dbiases = None
        if biases is not None:
            sums_of_rows = functools.partial(_sums_of_rows, slots, problem.slots)
            dbiases = ExpertBiases(*map(sums_of_rows, (*dprojected, dy), biases))
        return dx.astype(x.dtype), dpool, dbiases, None, None, jnp.where(valid, jnp.zeros_like(dy), dy)


differentiable_ffn.defvjp(_ffn_forward, _ffn_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable_matmul(
    backend: Backend,
    problem: Problem,
    transposed: bool,
    x: Float[Array, "M C"],
    pool: Shaped[Array, "S 1 _ _"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M N"],
) -> Float[Array, "M N"]:
    """`backend.matmul`, with gradients for x, a pool of floats and out; see `differentiable_ffn`."""
    return backend.matmul(x, pool, slot_of_group, group_sizes, out, problem, 0, transposed)


def _matmul_forward(backend: Backend, problem: Problem, transposed: bool, *arguments: Any) -> tuple[jax.Array, tuple]:
    return differentiable_matmul(backend, problem, transposed, *arguments), arguments[:-1]


def _matmul_backward(
    backend: Backend, problem: Problem, transposed: bool, kept: tuple, dy: Float[Array, "M N"]
) -> tuple:
    x, pool, slot_of_group, group_sizes = kept
    rounded = dy.astype(x.dtype)
    back = dataclasses.replace(problem, contract=problem.width, width=problem.contract)
    with jax.named_scope("slot_grouped_matmul_gradients"):
        dx = _product(backend, back, rounded, pool, slot_of_group, group_sizes, 0, contract_last=not transposed)
        dpool = None
        if jnp.issubdtype(pool.dtype, jnp.floating):
            a, b, wanted = (rounded, x, problem) if transposed else (x, rounded, back)
            dpool = _sums(backend, wanted, slot_of_group, group_sizes, a, b).astype(pool.dtype)[:, None]
        valid = slot_of_row(slot_of_group, group_sizes, problem.rows)[:, None] >= 0
        return dx.astype(x.dtype), dpool, None, None, jnp.where(valid, jnp.zeros_like(dy), dy)


differentiable_matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(
    backend: Backend,
    problem: Problem,
    x: Float[Array, "M C"],
    pool: Pool,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    part: int,
    *,
    contract_last: bool,
) -> Float[Array, "M N"]:
    """Float32, zeros in rows of no group."""
    zeros = jnp.zeros((problem.rows, problem.width), jnp.float32)
    run = _able(backend, problem).matmul
    return run(x, pool, slot_of_group, group_sizes, zeros, problem, part, contract_last)


def _sums(
    backend: Backend,
    problem: Problem,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
) -> Float[Array, "S A B"]:
    return _able(backend, problem).outer(a, b, slot_of_group, group_sizes, problem)


def _sums_of_rows(
    slots: Int32[Array, "M"], count: int, rows: Float[Array, "M N"], like: Float[Array, "S N"]
) -> Float[Array, "S N"]:
    """The sum of each slot's rows; rows of slot -1 count nowhere."""
    index = jnp.where(slots < 0, count, slots)
    return jax.ops.segment_sum(rows.astype(jnp.float32), index, num_segments=count).astype(like.dtype)


def _able(backend: Backend, problem: Problem) -> Backend:
    """`backend`, or where it cannot run a problem of the backward pass, the first that can."""
    return backend if backend.refuses(problem) is None else choose_backend(problem)
