"""The XLA backend: a loop over groups that slices one expert block at a time out of the pool.

`jax.lax.ragged_dot` is a dense masked expansion (it reads every expert); gathering blocks copies them slowly on CPU
(0.8 GB/s measured). A slice is a copy too, because XLA:CPU's matmuls take whole buffers only, so a block is sliced once
for all tiles of its group, and in parts that stay in the processor's cache until they are multiplied.

Rows travel as the bits of their storage dtype, and results as float32 sums: XLA:CPU turns a slice or an update of a
16-bit float buffer into a conversion of all of it, once a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.activations import activation_of
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.problem import Problem, fitting_tile_rows
from pallas_kernels.grouped_ffn.quantized import QuantizedPool
from pallas_kernels.grouped_ffn.storage import Pool, from_storage, to_storage, weights_of_slot
from pallas_kernels.grouped_ffn.xla_blocks import BlockPart, fits, load_biases, load_part
from pallas_kernels.grouped_ffn.xla_loop import visit_tiles

# Of a block on CPU. One token of OLMoE (8 blocks of 12.6 MB) on one core, quiet, jax 0.10.2: 16.1 ms where the blocks
# are arrays of their own, 19.1 ms in parts of 3 MB, 24 ms in parts of 0.8 MB or whole.
PART_BYTES = 3 << 20

_FIRST = (((1,), (0,)), ((), ()))
_LAST = (((1,), (1,)), ((), ()))
_ROWS = (((0,), (0,)), ((), ()))


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> Float32[Array, "_ _"]:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # GPUs would round float32 to TF32
    return jax.lax.dot_general(a, b, contract, precision=exact, preferred_element_type=jnp.float32)


def _parts(problem: Problem, groups: tuple[int, int] | None) -> int:
    """How many parts a block is taken in: of those that fit it the fewest that are small enough, or else the smallest.

    They are part of a result's rounding, so they depend on sizes and dtypes only. `groups`: of a quantized pool.
    """
    if problem.target.platform != "cpu":
        return 1
    block_bytes = (problem.down_part + 1) * problem.width * problem.contract * problem.dtype.itemsize
    least = -(-block_bytes // PART_BYTES)
    candidates = (*range(least, 4 * least), *range(least - 1, 0, -1))
    return next(parts for parts in candidates if fits(groups, problem.width, parts))


def _ffn(
    x: Float[Array, "M D"],
    pool: Pool,
    biases: ExpertBiases | None,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
    problem: Problem,
) -> Float[Array, "M D"]:
    dtype, tile_rows = x.dtype, problem.tile_rows
    parts = _parts(problem, pool.groups if isinstance(pool, QuantizedPool) else None)
    width = problem.width // parts
    act = activation_of(problem)
    rows_bits = to_storage(jnp.pad(x, ((0, tile_rows), (0, 0))))
    stored = pool if isinstance(pool, QuantizedPool) else to_storage(pool)

    def load(slot: jax.Array, part: jax.Array | int) -> tuple[BlockPart, ExpertBiases | None]:
        block = load_part(stored, slot, part, parts=parts, dtype=dtype)
        return block, None if biases is None else load_biases(biases, slot, part, width)

    def tile(
        loaded: tuple[BlockPart, ExpertBiases | None],
        part: jax.Array | int,
        row: jax.Array,
        rows: jax.Array,
        sums: jax.Array,
    ) -> jax.Array:
        block, of_slot = loaded
        tile_x = from_storage(jax.lax.dynamic_slice_in_dim(rows_bits, row, tile_rows, 0), dtype)
        columns = zip(jnp.split(tile_x, len(block.inward), axis=1), block.inward, strict=True)
        projected = functools.reduce(jnp.add, (_dot(of_x, weights, _LAST) for of_x, weights in columns))
        inner = jnp.split(projected, problem.down_part, axis=1)
        if of_slot is not None:
            inner = [of + bias for of, bias in zip(inner, of_slot[:2], strict=True)]
        activated = act(*inner).astype(dtype)
        y = jnp.concatenate([_dot(activated, of, _FIRST) for of in block.down], axis=1)
        if of_slot is not None:
            y = y + of_slot.down
        return _added(sums, y, row, rows, fresh=part == 0)

    sums = jnp.pad(out.astype(jnp.float32), ((0, tile_rows), (0, 0)))
    sums = visit_tiles(slot_of_group, group_sizes, problem, tile_rows, parts, load, tile, sums)
    return sums[: x.shape[0]].astype(out.dtype)


def _added(
    sums: Float32[Array, "R N"], y: Float32[Array, "H N"], row: jax.Array, rows: jax.Array, fresh: jax.Array | bool
) -> Float32[Array, "R N"]:
    """`sums` with the tile's valid rows added, or put there where `fresh`."""
    before = jax.lax.dynamic_slice_in_dim(sums, row, y.shape[0], 0)
    valid = jnp.arange(y.shape[0], dtype=jnp.int32)[:, None] < rows
    total = jnp.where(valid, jnp.where(fresh, y, before + y), before)
    return jax.lax.dynamic_update_slice_in_dim(sums, total, row, 0)


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
    tile_rows, dtype = problem.tile_rows, x.dtype
    rows_bits = to_storage(jnp.pad(x, ((0, tile_rows), (0, 0))))
    stored = pool if isinstance(pool, QuantizedPool) else to_storage(pool)

    def load(slot: jax.Array, _: jax.Array | int) -> jax.Array:
        if isinstance(stored, QuantizedPool):
            return weights_of_slot(stored, slot, dtype)[part].astype(dtype)
        matrix = jax.lax.dynamic_slice(stored, (slot, part, 0, 0), (1, 1, *stored.shape[2:]))
        return from_storage(matrix.reshape(stored.shape[2:]), dtype)

    def tile(weights: jax.Array, _: jax.Array | int, row: jax.Array, rows: jax.Array, sums: jax.Array) -> jax.Array:
        tile_x = from_storage(jax.lax.dynamic_slice_in_dim(rows_bits, row, tile_rows, 0), dtype)
        return _added(sums, _dot(tile_x, weights, _LAST if contract_last else _FIRST), row, rows, fresh=True)

    sums = jnp.pad(out.astype(jnp.float32), ((0, tile_rows), (0, 0)))
    sums = visit_tiles(slot_of_group, group_sizes, problem, tile_rows, 1, load, tile, sums)
    return sums[: x.shape[0]].astype(out.dtype)


def _outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
) -> Float32[Array, "S A B"]:
    # A tile costs a pass over a slot's sums, so it holds a whole group where it can.
    tile_rows = fitting_tile_rows(a.shape[0], slot_of_group.shape[0])
    left_bits, right_bits = (to_storage(jnp.pad(of, ((0, tile_rows), (0, 0)))) for of in (a, b))
    in_tile = jnp.arange(tile_rows, dtype=jnp.int32)[:, None]

    def tile(slot: jax.Array, _: jax.Array | int, row: jax.Array, rows: jax.Array, sums: jax.Array) -> jax.Array:
        left, right = (
            jnp.where(in_tile < rows, from_storage(jax.lax.dynamic_slice_in_dim(bits, row, tile_rows, 0), of.dtype), 0)
            for bits, of in ((left_bits, a), (right_bits, b))
        )
        before = jax.lax.dynamic_index_in_dim(sums, slot, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + _dot(left, right, _ROWS), slot, 0)

    empty = jnp.zeros((problem.slots, a.shape[1], b.shape[1]), jnp.float32)
    return visit_tiles(slot_of_group, group_sizes, problem, tile_rows, 1, lambda slot, _: slot, tile, empty)


BACKEND = Backend(name="xla", refuses=lambda problem: None, ffn=_ffn, matmul=_matmul, outer=_outer)
