"""The Triton kernel of the weights' gradient: for each slot, the outer products of its groups' rows summed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.triton_matmul import dot
from pallas_kernels.grouped_ffn.triton_tiles import TritonTiles
from pallas_kernels.grouped_ffn.triton_weights import Span, both

_CONTRACT_ROWS = (((0,), (0,)), ((), ()))


def slot_outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    groups: Int32[Array, "2 G"],
    of_slot: Int32[Array, "2 S"],
    tiles: TritonTiles,
    *,
    interpret: bool,
) -> Float32[Array, "S A B"]:
    """Sums of outer products; one program makes a tile of one slot's matrix, in the order of its groups and rows.

    Args:
      a, b: rows, sorted by group.
      groups: first row and number of rows of each group, those of a slot side by side.
      of_slot: first column and number of columns of `groups` that each slot has.
      tiles: `columns` of the result's tile on both sides, `depth` in rows.
      interpret: run in Pallas's interpreter.
    """
    left, right = a.shape[1], b.shape[1]
    slots, size = of_slot.shape[1], tiles.columns
    down, across = -(-left // size), -(-right // size)

    def kernel(groups_ref: Any, of_slot_ref: Any, a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        program = pl.program_id(0)
        slot, place = jax.lax.div(program, down * across), jax.lax.rem(program, down * across)
        sides = (
            Span(start=jax.lax.div(place, across) * size, size=size, limit=left),
            Span(start=jax.lax.rem(place, across) * size, size=size, limit=right),
        )

        def of_group(group: jax.Array, total: jax.Array) -> jax.Array:
            first, count = groups_ref[0, group], groups_ref[1, group]

            def step(number: jax.Array, total: jax.Array) -> jax.Array:
                in_group = number * tiles.depth + jax.lax.broadcasted_iota(jnp.int32, (tiles.depth, 1), 0)
                at = pl.ds(first + number * tiles.depth, tiles.depth)
                valid = in_group < count
                factors = [
                    plt.load(ref.at[at, side.at], mask=both(valid, side.inside(1), (tiles.depth, size)), other=0)
                    for ref, side in zip((a_ref, b_ref), sides, strict=True)
                ]
                return total + dot(factors[0], factors[1], _CONTRACT_ROWS)

            return jax.lax.fori_loop(0, jax.lax.div(count + tiles.depth - 1, tiles.depth), step, total)

        begin = of_slot_ref[0, slot]
        empty = jnp.zeros((size, size), jnp.float32)
        total = jax.lax.fori_loop(begin, begin + of_slot_ref[1, slot], of_group, empty)
        at = out_ref.at[slot, sides[0].at, sides[1].at]
        mask = both(sides[0].inside(0), sides[1].inside(1), (size, size))
        plt.store(at, total, mask=mask)

    kernel.__name__ = "grouped_outer"
    return pl.pallas_call(
        kernel,
        grid=(slots * down * across,),
        out_shape=jax.ShapeDtypeStruct((slots, left, right), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(groups, of_slot, a, b)
