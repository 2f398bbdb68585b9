"""The reference backend: every row against its own expert block, in f32. Slow, plain, the meaning of the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.activations import activation_of
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.storage import Pool, weights_of_slot
from pallas_kernels.grouped_ffn.work_items import slot_of_row

_HIGHEST = jax.lax.Precision.HIGHEST


def _ffn(
    x: Float[Array, "M D"],
    pool: Pool,
    biases: ExpertBiases | None,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
    problem: Problem,
) -> Float[Array, "M D"]:
    act = activation_of(problem)

    def one_row(slot: jax.Array, row: jax.Array, before: jax.Array) -> jax.Array:
        at = jnp.maximum(slot, 0)
        block = weights_of_slot(pool, at, row.dtype).astype(jnp.float32)
        wide = row.astype(jnp.float32)
        projected = [jnp.dot(block[part], wide, precision=_HIGHEST) for part in range(problem.down_part)]
        if biases is not None:
            projected = [of + bias[at].astype(jnp.float32) for of, bias in zip(projected, biases[:2], strict=True)]
        y = jnp.dot(act(*projected), block[problem.down_part], precision=_HIGHEST)
        if biases is not None:
            y = y + biases.down[at].astype(jnp.float32)
        return jnp.where(slot >= 0, y.astype(row.dtype), before)

    slots = slot_of_row(slot_of_group, group_sizes, x.shape[0])
    return jax.lax.map(lambda args: one_row(*args), (slots, x, out))


def _matmul(
    x: Float[Array, "M C"],
    pool: Pool,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M N"],
    problem: Problem,
    part: int,
    contract_last: bool,
) -> Float[Array, "M N"]:
    del problem

    def one_row(slot: jax.Array, row: jax.Array, before: jax.Array) -> jax.Array:
        weights = weights_of_slot(pool, jnp.maximum(slot, 0), row.dtype)[part].astype(jnp.float32)
        y = jnp.dot(row.astype(jnp.float32), weights.T if contract_last else weights, precision=_HIGHEST)
        return jnp.where(slot >= 0, y.astype(before.dtype), before)

    slots = slot_of_row(slot_of_group, group_sizes, x.shape[0])
    return jax.lax.map(lambda args: one_row(*args), (slots, x, out))


def _outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
) -> Float32[Array, "S A B"]:
    def one_row(sums: jax.Array, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        slot, left, right = row
        product = left.astype(jnp.float32)[:, None] * right.astype(jnp.float32)[None, :]
        return sums.at[jnp.maximum(slot, 0)].add(jnp.where(slot >= 0, product, 0.0)), None

    slots = slot_of_row(slot_of_group, group_sizes, a.shape[0])
    empty = jnp.zeros((problem.slots, a.shape[1], b.shape[1]), jnp.float32)
    return jax.lax.scan(one_row, empty, (slots, a, b))[0]


BACKEND = Backend(name="reference", refuses=lambda problem: None, ffn=_ffn, matmul=_matmul, outer=_outer)
