"""Sums of outer products on Hopper's tensor cores: the gradient of a pool's weights, slot by slot.

A block takes a tile of one slot's matrix at a time and sums over the rows of all groups of that slot, in row order. The
rows arrive in tiles of 64 that may hold other groups' rows at their ends; those are zeroed in shared memory first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.mosaic_api import CORE, WARPGROUP, call_kernel
from pallas_kernels.grouped_ffn.mosaic_items import BOX_ROWS, aligned_items, whole_boxes
from pallas_kernels.grouped_ffn.mosaic_ring import CONSUMER_REGISTERS, COPIER_REGISTERS, Ring
from pallas_kernels.grouped_ffn.mosaic_tiles import CHUNK_COLUMNS, CONSUMERS, WARPGROUP_ROWS, MosaicTiles


def outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    *,
    slots: int,
    tiles: MosaicTiles,
    cores: int,
    interpret: bool,
) -> Float32[Array, "S A B"]:
    """For each of `slots` slots, the sum of the outer products of its groups' rows of `a` and `b`."""
    height, width = a.shape[1], b.shape[1]
    sizes = jnp.ones_like(slot_of_group) if group_sizes is None else group_sizes
    items = aligned_items(slot_of_group, sizes, total_rows=a.shape[0], height=tiles.depth)
    exists = jnp.arange(items.slot.shape[0], dtype=jnp.int32) < items.total
    slot_of_item = jnp.where(exists, items.slot, slots)
    order = jnp.argsort(slot_of_item, stable=True)
    bounds = jnp.searchsorted(
        slot_of_item[order], jnp.arange(slots + 1, dtype=jnp.int32), side="left", method="compare_all"
    ).astype(jnp.int32)
    block_height = CONSUMERS * WARPGROUP_ROWS
    down, across = -(-height // block_height), -(-width // tiles.columns)
    count = slots * down * across

    def kernel(*refs: Any) -> None:
        a_gmem, b_gmem, bounds_gmem, box_gmem, begin_gmem, end_gmem, out_gmem, *scratch = refs
        a_smem, b_smem, out_smem, full, empty, cleared = scratch
        warpgroup = lax.axis_index(WARPGROUP)
        core = lax.axis_index(CORE)
        ring = Ring(stages=tiles.stages, full=full, empty=empty)

        def visit(turn: jax.Array, before: jax.Array, body: Any) -> jax.Array:
            index = core + turn * cores
            slot = lax.div(index, down * across)
            within = lax.rem(index, down * across)
            first = bounds_gmem[slot]
            steps = bounds_gmem[slot + 1] - first
            body(slot, lax.rem(within, down), lax.div(within, down), first, steps, before)
            return before + steps

        def copy_in(slot: Any, i: jax.Array, j: jax.Array, first: jax.Array, steps: jax.Array, before: Any) -> None:
            def step(k: jax.Array, carry: None) -> None:
                stage = ring.to_fill(before + k)
                rows = pl.ds(box_gmem[first + k] * BOX_ROWS, tiles.depth)
                for c in range(CONSUMERS):
                    columns = pl.ds(i * block_height + c * WARPGROUP_ROWS, WARPGROUP_ROWS)
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, columns], a_smem.at[stage * CONSUMERS + c], full.at[stage])
                columns = pl.ds(j * tiles.columns, tiles.columns)
                plgpu.copy_gmem_to_smem(b_gmem.at[rows, columns], b_smem.at[stage], full.at[stage])

            lax.fori_loop(0, steps, step, None)

        def clear(stage: jax.Array, item: jax.Array) -> None:
            begin, end = begin_gmem[item], end_gmem[item]

            @pl.when((begin > 0) | (end < tiles.depth))
            def _() -> None:
                _clear_rows(a_smem.at[stage * CONSUMERS + warpgroup], begin, end)
                for chunk in range(tiles.columns // CHUNK_COLUMNS):

                    @pl.when(warpgroup == chunk % CONSUMERS)
                    def _(chunk: int = chunk) -> None:
                        _clear_rows(b_smem.at[stage, :, pl.ds(chunk * CHUNK_COLUMNS, CHUNK_COLUMNS)], begin, end)

                plgpu.commit_smem()
                plgpu.barrier_arrive(cleared)
                plgpu.barrier_wait(cleared)

        def multiply(slot: Any, i: jax.Array, j: jax.Array, first: jax.Array, steps: jax.Array, before: Any) -> None:
            def accumulate(acc: Any) -> jax.Array:
                def step(k: jax.Array, carry: None) -> None:
                    stage = ring.to_read(before + k)
                    clear(stage, first + k)
                    plgpu.wgmma(acc, a_smem.at[stage * CONSUMERS + warpgroup].T, b_smem.at[stage])
                    ring.release_but_last(before + k, k)

                lax.fori_loop(0, steps, step, None)
                ring.release_last(before + steps, steps)
                return acc[...]

            sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, tiles.columns)))
            row = i * block_height + warpgroup * WARPGROUP_ROWS
            for chunk in range(0, tiles.columns, CHUNK_COLUMNS):
                column = j * tiles.columns + chunk

                @pl.when((row < height) & (column < width))
                def _(chunk: int = chunk, column: jax.Array = column) -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[warpgroup] = sums[:, chunk : chunk + CHUNK_COLUMNS]
                    plgpu.commit_smem()
                    target = out_gmem.at[slot, pl.ds(row, WARPGROUP_ROWS), pl.ds(column, CHUNK_COLUMNS)]
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], target)

        turns = lax.div(count - core + cores - 1, cores)

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            lax.fori_loop(0, turns, lambda turn, before: visit(turn, before, multiply), jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            ring.drain(lax.fori_loop(0, turns, lambda turn, before: visit(turn, before, copy_in), jnp.int32(0)))

    scratch = [
        plgpu.SMEM((tiles.stages * CONSUMERS, tiles.depth, WARPGROUP_ROWS), a.dtype),
        plgpu.SMEM((tiles.stages, tiles.depth, tiles.columns), b.dtype),
        plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, CHUNK_COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]
    a, b = (jnp.pad(rows, ((0, whole_boxes(rows.shape[0]) - rows.shape[0]), (0, 0))) for rows in (a, b))
    operands = (a, b, bounds, *(part[order] for part in (items.box, items.begin, items.end)))
    out = jax.ShapeDtypeStruct((slots, height, width), jnp.float32)
    return call_kernel(
        kernel,
        operands,
        out,
        scratch,
        cores=cores,
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
        name="grouped_outer",
    )


def _clear_rows(tile: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zeros in the rows of `tile` before `begin` and from `end` on."""
    row = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    tile[...] = jnp.where((row >= begin) & (row < end), tile[...], jnp.zeros((), tile.dtype))
