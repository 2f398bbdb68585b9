"""The XLA backend: a loop over tiles that slices one expert block at a time out of the pool.

`jax.lax.ragged_dot` is a dense masked expansion (it reads every expert); gathering blocks copies them slowly on CPU
(0.8 GB/s measured). The loop reads each active block once per tile: 8 GB/s on two CPU cores at 8 rows a tile, where a
tile costs what a single row does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.quantized import QuantizedPool
from pallas_kernels.grouped_ffn.storage import Pool, from_storage, weights_of_slot
from pallas_kernels.grouped_ffn.work_items import WorkItems, row_items, work_items

_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def _items(
    slot_of_group: Int32[Array, "G"], group_sizes: Int32[Array, "G"] | None, rows: int, tile_rows: int
) -> WorkItems:
    if group_sizes is None:
        return row_items(slot_of_group)
    return work_items(group_sizes, slot_of_group, total_rows=rows, tile_rows=tile_rows)


def _ffn(
    x: Float[Array, "M D"],
    pool: Pool,
    biases: ExpertBiases | None,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
    problem: Problem,
) -> Float[Array, "M D"]:
    rows, hidden = x.shape
    width, dtype, tile_rows = problem.width, x.dtype, problem.tile_rows
    act = ACTIVATIONS[problem.activation or ""]
    items = _items(slot_of_group, group_sizes, rows, tile_rows)
    padded_x = jnp.pad(x, ((0, tile_rows), (0, 0)))
    padded_out = jnp.pad(out, ((0, tile_rows), (0, 0)))
    in_tile = jnp.arange(tile_rows, dtype=jnp.int32)[:, None]

    def bias(of: Float[Array, "S N"], slot: jax.Array) -> Float32[Array, "1 N"]:
        return jax.lax.dynamic_index_in_dim(of, slot, 0).astype(jnp.float32)

    def tile(item: jax.Array, result: jax.Array) -> jax.Array:
        slot = jnp.maximum(slot_of_group[items.group[item]], 0)  # a skipped group's tile, if any, has no rows
        row = items.row[item]
        if isinstance(pool, QuantizedPool):
            weights = weights_of_slot(pool, slot, dtype).astype(dtype)
            gate_up, down = weights[:2].reshape(2 * width, hidden), weights[2]
        else:
            block = jax.lax.dynamic_index_in_dim(pool, slot, 0, keepdims=False)
            gate_up = from_storage(block[:2].reshape(2 * width, hidden), dtype)
            down = from_storage(block[2], dtype)
        tile_x = jax.lax.dynamic_slice_in_dim(padded_x, row, tile_rows, 0)
        projected = jax.lax.dot_general(tile_x, gate_up, _CONTRACT_LAST, preferred_element_type=jnp.float32)
        gate, up = projected[:, :width], projected[:, width:]
        if biases is not None:
            gate, up = gate + bias(biases.gate, slot), up + bias(biases.up, slot)
        y = jnp.dot(act(gate, up).astype(dtype), down, preferred_element_type=jnp.float32)
        if biases is not None:
            y = y + bias(biases.down, slot)
        before = jax.lax.dynamic_slice_in_dim(result, row, tile_rows, 0)
        kept = jnp.where(in_tile < items.rows[item], y.astype(dtype), before)
        return jax.lax.dynamic_update_slice_in_dim(result, kept, row, 0)

    return jax.lax.fori_loop(0, items.total, tile, padded_out)[:rows]


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
    rows, tile_rows = x.shape[0], problem.tile_rows
    items = _items(slot_of_group, group_sizes, rows, tile_rows)
    padded_x = jnp.pad(x, ((0, tile_rows), (0, 0)))
    padded_out = jnp.pad(out, ((0, tile_rows), (0, 0)))
    in_tile = jnp.arange(tile_rows, dtype=jnp.int32)[:, None]
    contract = _CONTRACT_LAST if contract_last else (((1,), (0,)), ((), ()))

    def tile(item: jax.Array, result: jax.Array) -> jax.Array:
        slot = jnp.maximum(slot_of_group[items.group[item]], 0)
        row = items.row[item]
        weights = weights_of_slot(pool, slot, x.dtype)[part].astype(x.dtype)
        tile_x = jax.lax.dynamic_slice_in_dim(padded_x, row, tile_rows, 0)
        y = jax.lax.dot_general(tile_x, weights, contract, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(result, row, tile_rows, 0)
        kept = jnp.where(in_tile < items.rows[item], y.astype(out.dtype), before)
        return jax.lax.dynamic_update_slice_in_dim(result, kept, row, 0)

    return jax.lax.fori_loop(0, items.total, tile, padded_out)[:rows]


def _outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
) -> Float32[Array, "S A B"]:
    rows, tile_rows = a.shape[0], problem.tile_rows
    items = _items(slot_of_group, group_sizes, rows, tile_rows)
    padded_a, padded_b = (jnp.pad(part, ((0, tile_rows), (0, 0))) for part in (a, b))
    in_tile = jnp.arange(tile_rows, dtype=jnp.int32)[:, None]

    def tile(item: jax.Array, sums: jax.Array) -> jax.Array:
        slot = jnp.maximum(slot_of_group[items.group[item]], 0)
        left, right = (
            jax.lax.dynamic_slice_in_dim(part, items.row[item], tile_rows, 0) for part in (padded_a, padded_b)
        )
        valid = in_tile < items.rows[item]
        product = jax.lax.dot_general(
            jnp.where(valid, left, 0),
            jnp.where(valid, right, 0),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        before = jax.lax.dynamic_index_in_dim(sums, slot, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + product, slot, 0)

    empty = jnp.zeros((problem.slots, a.shape[1], b.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, items.total, tile, empty)


BACKEND = Backend(name="xla", refuses=lambda problem: None, ffn=_ffn, matmul=_matmul, outer=_outer)
