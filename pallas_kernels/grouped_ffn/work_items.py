"""Cutting groups of rows into tiles of fixed height, without a host in the loop.

A group's tiles start at the group's first row, so a row's place in its tile depends on its rank within its group
alone. With a fixed height that makes a row's result independent of every other row: of the other groups, of which
groups are present, and of which call computes them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class WorkItems(NamedTuple):
    """Tiles to compute, as many as `total`; entries past it are meaningless."""

    total: Int32[Array, ""] | int
    group: Int32[Array, "N"]
    row: Int32[Array, "N"]
    rows: Int32[Array, "N"]


def row_items(slot_of_group: Int32[Array, "G"]) -> WorkItems:
    """One tile for each of G groups of one row, the rows of skipped groups empty: no sums, and a static count."""
    groups = slot_of_group.shape[0]
    row = jnp.arange(groups, dtype=jnp.int32)
    return WorkItems(groups, row, row, (slot_of_group >= 0).astype(jnp.int32))


def work_items(
    group_sizes: Int32[Array, "G"], slot_of_group: Int32[Array, "G"], *, total_rows: int, tile_rows: int
) -> WorkItems:
    """Tiles of every group that has a slot (`slot_of_group >= 0`), in row order.

    Args:
      group_sizes: rows of each group; groups follow one another in the sorted rows.
      slot_of_group: pool slot of each group, -1 for a group to skip.
      total_rows: M, a static bound on the rows.
      tile_rows: the fixed height of a tile.

    Returns:
      `WorkItems` of static length `min(M, ceil(M / tile_rows) + G - 1)`: the first row and the number of valid rows
      of each tile.
    """
    groups = group_sizes.shape[0]
    bound = max(1, min(total_rows, -(-total_rows // tile_rows) + groups - 1))
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    tiles = jnp.where(slot_of_group >= 0, -(-group_sizes // tile_rows), 0)
    tile_ends = jnp.cumsum(tiles)
    item = jnp.arange(bound, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, item, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    row = starts[group] + (item - (tile_ends - tiles)[group]) * tile_rows
    rows = jnp.minimum(tile_rows, ends[group] - row)
    return WorkItems(tile_ends[-1].astype(jnp.int32), group, row.astype(jnp.int32), rows.astype(jnp.int32))


def slot_of_row(
    slot_of_group: Int32[Array, "G"], group_sizes: Int32[Array, "G"] | None, total_rows: int
) -> Int32[Array, "M"]:
    """Each row's slot, -1 for rows that no group with a slot has."""
    if group_sizes is None:
        return slot_of_group
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(total_rows, dtype=jnp.int32)
    group = jnp.searchsorted(ends, row, side="right", method="compare_all")
    return jnp.where(group < ends.shape[0], slot_of_group[jnp.minimum(group, ends.shape[0] - 1)], -1)
