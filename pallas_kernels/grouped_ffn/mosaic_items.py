"""Tiles of rows for kernels whose copies must start at multiples of eight rows.

The Tensor Memory Accelerator copies rows into swizzled shared memory in boxes of eight. So a tile starts at or up to
seven rows before its group's first row, and knows which of its rows are the group's. A tensor core computes each row of
a tile by itself and in the same order, wherever it lies, so a row's result depends neither on where its group starts
nor on its neighbours.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

BOX_ROWS = 8


class AlignedItems(NamedTuple):
    """Tiles to compute, as many as `total`; entries past it are meaningless.

    Attributes:
      total: number of tiles.
      slot: whose weights each tile takes; at least 0.
      box: first row of each tile over eight.
      begin, end: which rows of each tile are its group's.
    """

    total: Int32[Array, "1"]
    slot: Int32[Array, "I"]
    box: Int32[Array, "I"]
    begin: Int32[Array, "I"]
    end: Int32[Array, "I"]


def whole_boxes(rows: int) -> int:
    """Rows of the fewest boxes that hold `rows` rows."""
    return -(-rows // BOX_ROWS) * BOX_ROWS


def tile_height(tile_rows: int) -> int:
    """Rows of a tile that holds any group of `tile_rows` rows, wherever it starts; or 64 or 128, for longer groups."""
    rows = whole_boxes(tile_rows)
    return min(rows + BOX_ROWS, 64) if rows <= 64 else 128


def aligned_items(
    slot_of_group: Int32[Array, "G"], group_sizes: Int32[Array, "G"] | None, *, total_rows: int, height: int
) -> AlignedItems:
    """Tiles of `height` rows of every group that has rows and a slot, in row order.

    Args:
      slot_of_group: pool slot of each group, -1 for a group to skip.
      group_sizes: rows of each group; None for groups of one row each.
      total_rows: M, a static bound on the rows.
      height: a multiple of eight.
    """
    groups = slot_of_group.shape[0]
    slot = jnp.maximum(slot_of_group, 0)
    if group_sizes is None:
        row = jnp.arange(groups, dtype=jnp.int32)
        begin = row % BOX_ROWS
        end = begin + (slot_of_group >= 0).astype(jnp.int32)
        return AlignedItems(jnp.full(1, groups, jnp.int32), slot, row // BOX_ROWS, begin, end)
    filled = min(groups, total_rows)
    bound = max(1, min(total_rows, (total_rows + (BOX_ROWS - 2) * filled) // height + filled))
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    aligned = starts // BOX_ROWS * BOX_ROWS
    tiles = jnp.where((slot_of_group >= 0) & (group_sizes > 0), -(-(ends - aligned) // height), 0)
    tile_ends = jnp.cumsum(tiles)
    item = jnp.arange(bound, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, item, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    first = aligned[group] + (item - (tile_ends - tiles)[group]) * height
    return AlignedItems(
        tile_ends[-1:].astype(jnp.int32),
        slot[group],
        first // BOX_ROWS,
        jnp.maximum(starts[group] - first, 0),
        jnp.minimum(ends[group] - first, height),
    )
