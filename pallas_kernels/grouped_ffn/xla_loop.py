"""The loop of the XLA backend: groups, parts of their blocks, tiles of their rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.work_items import row_items, work_items

Load = Callable[[jax.Array, jax.Array | int], Any]
Tile = Callable[[Any, jax.Array | int, jax.Array, jax.Array, jax.Array], jax.Array]


class _Spans(NamedTuple):
    """Runs of rows that use one block, `total` of them; entries past it are meaningless."""

    total: Int32[Array, ""] | int
    slot: Int32[Array, "N"]
    row: Int32[Array, "N"]
    rows: Int32[Array, "N"]


def visit_tiles(
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
    tile_rows: int,
    parts: int,
    load: Load,
    tile: Tile,
    carry: jax.Array,
) -> jax.Array:
    """`carry` after every tile of every group that has a slot.

    On a CPU each part of a block is loaded once for all tiles of its group, and loops end where the groups do.
    Elsewhere a loop whose end is computed makes the host wait for the device, so it runs over the static bound of
    tiles, the ones past the last without rows, and `parts` must be 1.

    Args:
      slot_of_group, group_sizes, problem: as a backend gets them.
      tile_rows: height of a tile.
      parts: parts of a block.
      load: `(slot, part) -> weights`.
      tile: `(weights, part, first row, rows from there to the group's end, carry) -> carry`.
      carry: what `tile` updates.
    """
    on_cpu = problem.target.platform == "cpu"
    single = group_sizes is None or not on_cpu
    spans = _spans(slot_of_group, group_sizes, problem.rows, tile_rows, on_cpu=on_cpu)

    def one_part(span: jax.Array, part: jax.Array | int, carry: jax.Array) -> jax.Array:
        weights = load(spans.slot[span], part)

        def one_tile(index: jax.Array | int, carry: jax.Array) -> jax.Array:
            done = index * tile_rows
            return tile(weights, part, spans.row[span] + done, spans.rows[span] - done, carry)

        if single:
            return one_tile(0, carry)
        return jax.lax.fori_loop(0, -(-spans.rows[span] // tile_rows), one_tile, carry)

    def one_span(span: jax.Array, carry: jax.Array) -> jax.Array:
        if not on_cpu:
            return one_part(span, 0, carry)
        held = jnp.where(spans.rows[span] > 0, parts, 0)
        return jax.lax.fori_loop(0, held, lambda part, carry: one_part(span, part, carry), carry)

    return jax.lax.fori_loop(0, spans.total, one_span, carry)


def _spans(
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    total_rows: int,
    tile_rows: int,
    *,
    on_cpu: bool,
) -> _Spans:
    """Busy groups on a CPU, else tiles, or single rows."""
    if group_sizes is None:
        items = row_items(slot_of_group)
        return _Spans(items.total, jnp.maximum(slot_of_group, 0), items.row, items.rows)
    if not on_cpu:
        items = work_items(group_sizes, slot_of_group, total_rows=total_rows, tile_rows=tile_rows)
        bound = items.row.shape[0]
        rows = jnp.where(jnp.arange(bound, dtype=jnp.int32) < items.total, items.rows, 0)
        return _Spans(bound, jnp.maximum(slot_of_group[items.group], 0), items.row, rows)
    groups = slot_of_group.shape[0]
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    busy = jnp.cumsum(((slot_of_group >= 0) & (group_sizes > 0)).astype(jnp.int32))
    place = jnp.arange(groups, dtype=jnp.int32)
    group = jnp.searchsorted(busy, place, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    return _Spans(busy[-1], slot_of_group[group], (ends - group_sizes)[group], group_sizes[group])
