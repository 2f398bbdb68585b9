"""The Triton kernel of gate-up-activation, of the down projection and of the plain matmul: one loop over tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.quantized import Format, QuantizedPool
from pallas_kernels.grouped_ffn.storage import Pool, from_storage
from pallas_kernels.grouped_ffn.triton_tiles import TritonTiles
from pallas_kernels.grouped_ffn.triton_weights import Span, Weights, both, load_row

# Tiles of rows that are computed side by side, so that the L2 cache gives them the weights that they share.
_SIDE_BY_SIDE = 8

_CONTRACT_FIRST = (((1,), (0,)), ((), ()))
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one kernel computes: each tile's rows times `parts` of its slot's block, and what becomes of the sums.

    Attributes:
      name: of the kernel, as profilers show it.
      parts: of the block: 0, 1 or 2.
      contract_last: whether the sums are over the block's columns, else over its rows.
      combine: makes one result of the parts' sums, in float32; None to store the sum of the one part.
      height: rows of a tile.
      tiles: the other sizes of the tiles.
      interpret: run in Pallas's interpreter.
    """

    name: str
    parts: tuple[int, ...]
    contract_last: bool
    combine: Callable[..., jax.Array] | None = None
    height: int
    tiles: TritonTiles
    interpret: bool


def slot_matmul(
    x: Float[Array, "M C"],
    pool: Pool,
    biases: tuple[Float[Array, "S N"], ...],
    table: Int32[Array, "3 items"],
    out: Float[Array, "M N"] | jax.ShapeDtypeStruct,
    plan: Plan,
) -> Float[Array, "M N"]:
    """`out` with the rows of every tile computed.

    Args:
      x: rows, sorted by group.
      pool: of blocks `[P, A, B]`.
      biases: one a part, or none; added to the sums.
      table: slot, first row and number of rows of each tile; tiles without rows are skipped.
      out: what all other rows hold; anything where it is only a shape.
      plan: what to compute.
    """
    form: Format | None
    if isinstance(pool, QuantizedPool):
        arrays: tuple[jax.Array, ...] = (pool.values, pool.gate_up_scales, pool.down_scales)
        groups, form = pool.groups, pool.format
    else:
        arrays, groups, form = (from_storage(pool, x.dtype),), (0, 0), None
    block_rows, stored = arrays[0].shape[2:]
    depth, width = (stored, block_rows) if plan.contract_last else (block_rows, stored)
    items, stripes = table.shape[1], -(-width // plan.tiles.columns)

    def kernel(table_ref: Any, x_ref: Any, *refs: Any) -> None:
        scales = (refs[1], refs[2]) if form is not None else None
        weights = Weights(values=refs[0], scales=scales, groups=groups, format=form, contract_last=plan.contract_last)
        bias_refs = refs[len(arrays) : len(arrays) + len(biases)]
        item, stripe = _place(pl.program_id(0), items, stripes)
        tile = _Tile(slot=table_ref[0, item], first=table_ref[1, item], rows=table_ref[2, item], height=plan.height)

        @pl.when(tile.rows > 0)
        def _() -> None:
            columns = Span(start=stripe * plan.tiles.columns, size=plan.tiles.columns, limit=width)
            sums = _sums(x_ref, weights, tile, columns, depth, plan)
            # Two sums of one part are of the columns in the low and in the high halves of the bytes.
            spans = [columns.moved(half * width) for half in range(len(sums) // len(plan.parts))]
            places = [(number, span) for number in range(len(plan.parts)) for span in spans]
            for at, (number, span) in enumerate(places):
                sums[at] = weights.scaled(sums[at], tile.slot, plan.parts[number], span)
                if bias_refs:
                    sums[at] += load_row(bias_refs[number].at[tile.slot, span.at], span)
            results = sums if plan.combine is None else [plan.combine(*sums)]
            for span, result in zip(spans, results, strict=True):
                tile.store(refs[-1], span, result)

    kernel.__name__ = plan.name
    operands: tuple[jax.Array, ...] = (table, x, *arrays, *biases)
    kept = isinstance(out, jax.Array)
    return pl.pallas_call(
        kernel,
        grid=(items * stripes,),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={len(operands): 0} if kept else {},
        compiler_params=plt.CompilerParams(num_warps=plan.tiles.warps, num_stages=plan.tiles.stages),
        interpret=plan.interpret,
    )(*operands, *([out] if kept else []))


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Rows of one group, at most `height`; those past `rows` are neither read nor written."""

    slot: Any
    first: Any
    rows: Any
    height: int

    @property
    def _valid(self) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (self.height, 1), 0) < self.rows

    def load(self, ref: Any, columns: Span) -> jax.Array:
        mask = both(self._valid, columns.inside(1), (self.height, columns.size))
        return plt.load(ref.at[pl.ds(self.first, self.height), columns.at], mask=mask, other=0)

    def store(self, ref: Any, columns: Span, values: jax.Array) -> None:
        mask = both(self._valid, columns.inside(1), (self.height, columns.size))
        plt.store(ref.at[pl.ds(self.first, self.height), columns.at], values.astype(ref.dtype), mask=mask)


def _place(program: jax.Array, items: int, stripes: int) -> tuple[jax.Array, jax.Array]:
    """Tile and stripe of columns of a program: `_SIDE_BY_SIDE` tiles in turn, then their next stripe."""
    band = jax.lax.div(program, _SIDE_BY_SIDE * stripes)
    within = program - band * (_SIDE_BY_SIDE * stripes)
    beside = jnp.minimum(items - band * _SIDE_BY_SIDE, _SIDE_BY_SIDE)
    stripe = jax.lax.div(within, beside)
    return band * _SIDE_BY_SIDE + within - stripe * beside, stripe


def _sums(
    x_ref: Any, weights: Weights, tile: _Tile, columns: Span, depth: int, plan: Plan
) -> list[Float32[Array, "height columns"]]:
    """float32 sums of a tile over all of the contracted axis: one a part, or two where a byte holds two columns."""
    apart = weights.packed and not plan.contract_last
    numbers = _CONTRACT_LAST if plan.contract_last else _CONTRACT_FIRST

    def step(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        along = Span(start=number * plan.tiles.depth, size=plan.tiles.depth, limit=depth)
        spans = (columns, along) if plan.contract_last else (along, columns)
        lefts = [tile.load(x_ref, along)]
        if weights.packed and plan.contract_last:  # the halves of a byte meet two places of the rows
            lefts.append(tile.load(x_ref, along.moved(depth)))
        found = [weights.tiles(tile.slot, part, *spans, lefts[0].dtype) for part in plan.parts]
        terms = (
            [[(lefts[0], right)] for of_part in found for right in of_part]
            if apart
            else [list(zip(lefts, of_part, strict=True)) for of_part in found]
        )
        totals = []
        for total, pairs in zip(sums, terms, strict=True):
            for left, right in pairs:
                total = total + dot(left, right, numbers)
            totals.append(total)
        return tuple(totals)

    empty = jnp.zeros((plan.height, plan.tiles.columns), jnp.float32)
    start = (empty,) * (len(plan.parts) * (2 if apart else 1))
    return list(jax.lax.fori_loop(0, -(-depth // plan.tiles.depth), step, start))


def dot(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
    """Product in float32; of float32 factors without TF32, whose error is beyond what `grouped_ffn` promises."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=jnp.float32)
