"""Tiles of rows and of weights inside a Triton kernel: weights are read in place, and dequantized in registers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32

from pallas_kernels.grouped_ffn.fp8 import FP8_BLOCK, decode_e4m3
from pallas_kernels.grouped_ffn.quantized import Format, decode_halves, decode_scales, is_packed


@dataclass(frozen=True, kw_only=True)
class Span:
    """A tile's part of an axis: `size` places from `start`, those below `limit`, all of them `offset` further on.

    Starts are multiples of the size where the axis is cut into tiles.
    """

    start: Any
    size: int
    limit: int
    offset: int = 0

    @property
    def at(self) -> Any:
        """The index that a ref takes."""
        return pl.ds(self.start + self.offset, self.size)

    def moved(self, offset: int) -> "Span":
        """The same places, `offset` further on."""
        return Span(start=self.start, size=self.size, limit=self.limit, offset=self.offset + offset)

    def inside(self, axis: int) -> jax.Array | None:
        """Which places are below the limit, `[size, 1]` along axis 0 or `[1, size]` along axis 1; None for all."""
        if self.limit % self.size == 0:
            return None
        shape = (self.size, 1) if axis == 0 else (1, self.size)
        return self.start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < self.limit


def both(rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """The mask `[rows, columns]` of two masks `[rows, 1]` and `[1, columns]`, None standing for all."""
    if rows is None or columns is None:
        one = columns if rows is None else rows
        return None if one is None else jnp.broadcast_to(one, shape)
    return rows & columns


def load(ref: Any, lead: tuple[Any, ...], rows: Span, columns: Span) -> jax.Array:
    """`ref[*lead, rows, columns]`, zeros where the spans end."""
    at = ref.at[(*lead, rows.at, columns.at)]
    mask = both(rows.inside(0), columns.inside(1), (rows.size, columns.size))
    return plt.load(at) if mask is None else plt.load(at, mask=mask, other=0)


def load_row(at: Any, columns: Span) -> Float32[Array, "1 columns"]:
    """What the indexed ref has for each column, zeros where the span ends."""
    mask = columns.inside(1)
    row = plt.load(at) if mask is None else plt.load(at, mask=mask.reshape(columns.size), other=0)
    return row.astype(jnp.float32).reshape(1, columns.size)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A pool's arrays as a kernel has them.

    Attributes:
      values: ref `[S, P, A, B]`, B the stored columns.
      scales: refs of `gate_up_scales` and `down_scales`; None for a dense pool.
      groups: weights that share a scale, of gate and up, and of down.
      format: of a quantized pool; None for a dense one.
      contract_last: whether a block's columns are summed over, else its rows.
    """

    values: Any
    scales: tuple[Any, Any] | None
    groups: tuple[int, int]
    format: Format | None
    contract_last: bool

    @property
    def packed(self) -> bool:
        """Whether an element holds two weights."""
        return self.format is not None and is_packed(self.format)

    def _scaled_after(self, part: int) -> bool:
        """Whether a part's scales belong to the columns of the result, so that sums are scaled instead of weights."""
        return self.format == "int8" and (part < 2) == self.contract_last

    def scaled(self, total: jax.Array, slot: Any, part: int, columns: Span) -> jax.Array:
        """A sum of products with `tiles`, times the scales that they lack."""
        if not self._scaled_after(part) or self.scales is None:
            return total
        none = jnp.int32(0)
        if part < 2:
            return total * load_row(self.scales[0].at[slot, jnp.int32(part), columns.at, none], columns)
        return total * load_row(self.scales[1].at[slot, none, columns.at], columns)

    def tiles(self, slot: Any, part: int, rows: Span, columns: Span, dtype: Any) -> tuple[jax.Array, ...]:
        """The tile of a slot's part, as `dtype`; of the 4-bit formats two: of those columns, and of those B further."""
        # jnp.int32: the interpreter takes no Python integers as indices.
        stored = load(self.values, (slot, jnp.int32(part)), rows, columns)
        if self.format is None:
            return (stored,)
        if self._scaled_after(part):
            return (stored.astype(dtype),)
        if self.format == "fp8":
            return ((decode_e4m3(stored) * self._scales_of_blocks(slot, part, rows, columns)).astype(dtype),)
        wide = (stored.astype(jnp.float32),) if self.format == "int8" else decode_halves(stored, self.format)
        return tuple(
            (half * self._scales(slot, part, rows, columns.moved(number * columns.limit))).astype(dtype)
            for number, half in enumerate(wide)
        )

    def _scales(self, slot: Any, part: int, rows: Span, columns: Span) -> jax.Array:
        """Scales of a tile, `[rows, columns]`, or of size 1 along an axis where they share one."""
        gate_up_ref, down_ref = self.scales or (None, None)
        if part < 2:
            return _scales_of_tile(gate_up_ref, (slot, jnp.int32(part)), rows, columns, 1, self.groups[0])
        return _scales_of_tile(down_ref, (slot,), rows, columns, 0, self.groups[1])

    def _scales_of_blocks(self, slot: Any, part: int, rows: Span, columns: Span) -> jax.Array:
        """The same of fp8, whose scales are shared along both axes."""
        gate_up_ref, down_ref = self.scales or (None, None)
        ref, lead = (gate_up_ref, (slot, jnp.int32(part))) if part < 2 else (down_ref, (slot,))
        few_rows, few_columns = _shared(rows, FP8_BLOCK), _shared(columns, FP8_BLOCK)
        if few_rows is None or few_columns is None:
            raise ValueError(f"tiles of {rows.size} x {columns.size} do not fit blocks of {FP8_BLOCK} x {FP8_BLOCK}")
        return _spread(_spread(load(ref, lead, few_rows, few_columns), 0, FP8_BLOCK), 1, FP8_BLOCK)


def _scales_of_tile(
    ref: Any, lead: tuple[Any, ...], rows: Span, columns: Span, axis: int, group: int
) -> Float[Array, "_ _"]:
    """A tile's scales out of `ref[*lead, rows, columns]`, which has one for `group` weights along the axis."""
    few = _shared((rows, columns)[axis], group)
    if few is None:
        return _scale_of_each(ref, lead, rows, columns, axis, group)
    return _spread(decode_scales(load(ref, lead, *((few, columns) if axis == 0 else (rows, few)))), axis, group)


def _spread(scales: Float[Array, "_ _"], axis: int, group: int) -> Float[Array, "_ _"]:
    """Each scale `group` times along an axis, unless there is only one."""
    count = scales.shape[axis]
    if count == 1:
        return scales
    shape = [*scales.shape[:axis], count, group, *scales.shape[axis + 1 :]]
    spread = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), shape)
    return spread.reshape(*scales.shape[:axis], count * group, *scales.shape[axis + 1 :])


def _shared(span: Span, group: int) -> Span | None:
    """The scales of a span that has whole groups of weights, or lies in one; None for other groups."""
    if span.offset % span.size == 0:
        at = span.start + span.offset
        if group % span.size == 0:
            return Span(start=jax.lax.div(at, group), size=1, limit=1)
        if span.size % group == 0:
            count = -(-(span.limit + span.offset) // group)
            return Span(start=jax.lax.div(at, group), size=span.size // group, limit=count)
    return None


def _scale_of_each(
    ref: Any, lead: tuple[Any, ...], rows: Span, columns: Span, axis: int, group: int
) -> Float[Array, "rows columns"]:
    """The same by one load a weight, for groups that do not fit the tiles."""
    shape = (rows.size, columns.size)
    places = [span.start + jax.lax.broadcasted_iota(jnp.int32, shape, n) for n, span in enumerate((rows, columns))]
    mask = (places[0] < rows.limit) & (places[1] < columns.limit)
    places = [place + span.offset for place, span in zip(places, (rows, columns), strict=True)]
    places[axis] = jax.lax.div(places[axis], group)
    every = [jnp.full(shape, index, jnp.int32) for index in lead]
    return decode_scales(plt.load(ref.at[(*every, *places)], mask=mask, other=0))
