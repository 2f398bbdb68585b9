"""Rows times their groups' weights on Hopper's tensor cores: the kernel of gate and up, of down and of plain matmuls.

One block a multiprocessor stays for the whole call and walks over tiles: a tile of rows of one group times some columns
of that group's weights. One warpgroup copies rows and weights (TMA) into a ring of stages and runs ahead over tile
boundaries, so that memory never waits for the ends of tiles; two warpgroups multiply (wgmma) and store. A wgmma
multiplies 64 rows. Where a tile has fewer, only these are copied, and the rest computes on what lies in shared memory:
free, as weights come at memory's speed then. Weights of 8 bits are widened on their way, exactly, and scaled after the
sums.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.grouped_ffn.mosaic_api import CORE, WARPGROUP, call_kernel, load_any
from pallas_kernels.grouped_ffn.mosaic_items import BOX_ROWS, AlignedItems, whole_boxes
from pallas_kernels.grouped_ffn.mosaic_ring import CONSUMER_REGISTERS, COPIER_REGISTERS, Ring
from pallas_kernels.grouped_ffn.mosaic_tiles import (
    CHUNK_COLUMNS,
    CONSUMERS,
    WARPGROUP_ROWS,
    WIDENED,
    MosaicTiles,
    row_groups,
)


class Tile(NamedTuple):
    """Where a tile lies: slot of the pool, first row over eight, which of its rows are its group's, and column tile."""

    slot: jax.Array
    box: jax.Array
    begin: jax.Array
    end: jax.Array
    across: jax.Array


def project(
    x: Float[Array, "R C"],
    pool: Shaped[Array, "S P A B"],
    scales: tuple[Float[Array, "S N"], ...],
    biases: tuple[Float[Array, "S N"], ...],
    items: AlignedItems,
    out: Float[Array, "M N"] | jax.ShapeDtypeStruct,
    *,
    parts: tuple[int, ...],
    contract_last: bool,
    epilogue: Callable[..., jax.Array],
    height: int,
    tiles: MosaicTiles,
    cores: int,
    interpret: bool,
    name: str,
) -> Float[Array, "M N"]:
    """`out`, its rows in `items` replaced by `epilogue` of their products with the `parts` of their slots' blocks.

    Other rows are left as `out` has them; anything, where `out` is a mere shape.

    Args:
      x: bfloat16 or float16 rows; those of `out`, in whole eights or not.
      pool: blocks of x's dtype, or of int8; a part is `[N, C]` with `contract_last`, else `[C, N]`.
      scales: of int8 weights, one array for each part; else none.
      biases: one array for each part, or none.
      items: tiles of `height` rows.
      epilogue: float32 `[64, columns]` of each part to the result.
      cores: blocks to launch.
      name: of the kernel, in traces.
    """
    contract = x.shape[1]
    width = out.shape[1]
    steps = -(-contract // tiles.depth)
    along_rows = row_groups(height)
    along_columns = CONSUMERS // along_rows
    block_columns = along_columns * tiles.columns
    column_tiles = -(-width // block_columns)
    padded_rows = whole_boxes(x.shape[0])
    copied_rows = min(height, WARPGROUP_ROWS, padded_rows)
    weight_tile = (len(parts) * tiles.columns, tiles.depth) if contract_last else (tiles.depth, tiles.columns)
    beyond = column_tiles * block_columns - width
    scaled, biased, widened = bool(scales), bool(biases), pool.dtype != x.dtype
    vectors = tuple(jnp.pad(of.astype(jnp.float32), ((0, 0), (0, beyond))) for of in (*scales, *biases))
    x = jnp.pad(x, ((0, padded_rows - x.shape[0]), (0, 0)))

    def kernel(*refs: Any) -> None:
        x_gmem, pool_gmem, total_gmem, slot_gmem, box_gmem, begin_gmem, end_gmem, *rest = refs
        vectors_gmem, (out_gmem, *scratch) = rest[: len(vectors)], rest[len(vectors) :]
        x_smem, w_smem, wide_smem, whole_smem, part_smem, full, empty = scratch
        warpgroup = lax.axis_index(WARPGROUP)
        core = lax.axis_index(CORE)
        total = total_gmem[0]
        ring = Ring(stages=tiles.stages, full=full, empty=empty)

        def tile_at(index: jax.Array) -> Tile:
            block = index // (tiles.walk * column_tiles)
            within = index - block * (tiles.walk * column_tiles)
            size = jnp.maximum(jnp.minimum(tiles.walk, total - block * tiles.walk), 1)
            item = block * tiles.walk + lax.rem(within, size)
            return Tile(slot_gmem[item], box_gmem[item], begin_gmem[item], end_gmem[item], lax.div(within, size))

        def each_tile(body: Callable[[Tile, jax.Array], None]) -> jax.Array:
            """Calls `body` with the tiles of this block that have rows, and the steps before each; gives all steps."""

            def visit(turn: jax.Array, carry: tuple[Tile, jax.Array]) -> tuple[Tile, jax.Array]:
                tile, before = carry
                # Looked up a tile ahead, so that nobody waits for the device's memory between tiles.
                following = tile_at(jnp.minimum(core + (turn + 1) * cores, last))

                @pl.when(tile.end > tile.begin)
                def _() -> None:
                    body(tile, before)

                return following, before + jnp.where(tile.end > tile.begin, steps, 0)

            count = total * column_tiles
            last = jnp.maximum(count - 1, 0)
            first = tile_at(jnp.minimum(core, last)), jnp.int32(0)
            return lax.fori_loop(0, lax.div(count - core + cores - 1, cores), visit, first)[1]

        def copy_in(tile: Tile, before: jax.Array) -> None:
            def step(k: jax.Array, carry: None) -> None:
                stage = ring.to_fill(before + k)
                depth = pl.ds(k * tiles.depth, tiles.depth)
                for r in range(along_rows):
                    rows = pl.ds(tile.box * BOX_ROWS + r * WARPGROUP_ROWS, copied_rows)
                    target = x_smem.at[stage * along_rows + r, pl.ds(0, copied_rows)]
                    plgpu.copy_gmem_to_smem(x_gmem.at[rows, depth], target, full.at[stage])
                for c in range(along_columns):
                    columns = pl.ds(tile.across * block_columns + c * tiles.columns, tiles.columns)
                    for p, part in enumerate(parts):
                        if contract_last:
                            source = pool_gmem.at[tile.slot, part, columns, depth]
                            target = w_smem.at[stage * along_columns + c, pl.ds(p * tiles.columns, tiles.columns)]
                        else:
                            source = pool_gmem.at[tile.slot, part, depth, columns]
                            target = w_smem.at[stage * along_columns + c]
                        plgpu.copy_gmem_to_smem(source, target, full.at[stage])

            lax.fori_loop(0, steps, step, None)

        def of_columns(vectors: Any, slot: jax.Array, column: jax.Array) -> jax.Array:
            loaded = load_any(vectors.at[slot, pl.ds(column, tiles.columns)])
            return lax.broadcast_in_dim(loaded, (WARPGROUP_ROWS, tiles.columns), (1,))

        def consume(tile: Tile, before: jax.Array) -> None:
            row_group = lax.rem(warpgroup, along_rows)
            column = tile.across * block_columns + lax.div(warpgroup, along_rows) * tiles.columns
            first = row_group * WARPGROUP_ROWS
            begin = jnp.clip(tile.begin - first, 0, WARPGROUP_ROWS)
            rows = jnp.clip(tile.end - first, 0, WARPGROUP_ROWS) - begin
            used = (rows > 0) & (column < width)

            @pl.when(used)
            def _() -> None:
                multiply(tile.slot, tile.box * BOX_ROWS + first, begin, rows, column, before)

            @pl.when(jnp.logical_not(used))
            def _() -> None:
                ring.skip(before, steps)

        def multiply(
            slot: jax.Array, row: jax.Array, begin: jax.Array, rows: jax.Array, column: jax.Array, before: jax.Array
        ) -> None:
            row_group, column_group = lax.rem(warpgroup, along_rows), lax.div(warpgroup, along_rows)

            def accumulate(acc: Any) -> jax.Array:
                def step(k: jax.Array, carry: None) -> None:
                    stage = ring.to_read(before + k)
                    weights = w_smem.at[stage * along_columns + column_group]
                    if widened:
                        wide = wide_smem.at[warpgroup * WIDENED + lax.rem(k, WIDENED)]
                        wide[...] = weights[...].astype(x.dtype)
                        plgpu.commit_smem()
                        weights = wide
                    plgpu.wgmma(acc, x_smem.at[stage * along_rows + row_group], weights.T if contract_last else weights)
                    ring.release_but_last(before + k, k)

                lax.fori_loop(0, steps, step, None)
                ring.release_last(before + steps, steps)
                return acc[...]

            sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, len(parts) * tiles.columns)))
            projected = []
            for p in range(len(parts)):
                one = sums[:, p * tiles.columns : (p + 1) * tiles.columns] if len(parts) > 1 else sums
                if scaled:
                    one = one * of_columns(vectors_gmem[p], slot, column)
                if biased:
                    one = one + of_columns(vectors_gmem[p - len(parts)], slot, column)
                projected.append(one)
            result = epilogue(*projected).astype(out.dtype)
            for chunk in range(0, tiles.columns, CHUNK_COLUMNS):

                @pl.when(column + chunk < width)
                def _(chunk: int = chunk) -> None:
                    value = result[:, chunk : chunk + CHUNK_COLUMNS]
                    target = out_gmem.at[:, pl.ds(pl.multiple_of(column + chunk, CHUNK_COLUMNS), CHUNK_COLUMNS)]
                    store(value, row, begin, rows, target)

        def store(value: jax.Array, row: jax.Array, begin: jax.Array, rows: jax.Array, target: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if height >= WARPGROUP_ROWS and target.shape[0] >= WARPGROUP_ROWS:

                @pl.when(rows == WARPGROUP_ROWS)
                def whole() -> None:
                    whole_smem[warpgroup] = value
                    plgpu.commit_smem()
                    rows_here = pl.ds(pl.multiple_of(row, BOX_ROWS), WARPGROUP_ROWS)
                    plgpu.copy_smem_to_gmem(whole_smem.at[warpgroup], target.at[rows_here])

            @pl.when(rows < WARPGROUP_ROWS)
            def part() -> None:
                part_smem[warpgroup] = value
                plgpu.commit_smem()
                _store_rows(
                    part_smem.at[warpgroup], begin, target, row + begin, rows, most=min(copied_rows, WARPGROUP_ROWS - 1)
                )

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            each_tile(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            ring.drain(each_tile(copy_in))

    copies = along_rows + along_columns * len(parts)
    scratch = [
        plgpu.SMEM((tiles.stages * along_rows, WARPGROUP_ROWS, tiles.depth), x.dtype),
        plgpu.SMEM((tiles.stages * along_columns, *weight_tile), pool.dtype),
        plgpu.SMEM((CONSUMERS * WIDENED, *weight_tile), x.dtype) if widened else None,
        plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, CHUNK_COLUMNS), out.dtype),
        plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, CHUNK_COLUMNS), out.dtype),
        plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
    ]
    operands = (x, pool, *items, *vectors)
    return call_kernel(
        kernel, operands, out, scratch, cores=cores, warpgroups=CONSUMERS + 1, interpret=interpret, name=name
    )


def _store_rows(source: Any, begin: jax.Array, target: Any, row: jax.Array, rows: jax.Array, *, most: int) -> None:
    """Copies `rows` rows. A copy's size is static, so there is one for each power of two, or none."""
    size = 1 << (min(most, target.shape[0]).bit_length() - 1)
    while size:

        @pl.when((rows & size) != 0)
        def _(begin: jax.Array = begin, row: jax.Array = row, size: int = size) -> None:
            plgpu.copy_smem_to_gmem(source.at[pl.ds(begin, size)], target.at[pl.ds(row, size)])

        begin, row = begin + (rows & size), row + (rows & size)
        size //= 2
