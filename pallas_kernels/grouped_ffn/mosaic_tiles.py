"""Sizes of the Mosaic backend's tiles on an H100: what was measured, and a rule where nothing was."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.grouped_ffn.mosaic_items import tile_height
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.tiles import Operation, Tiles, settle_tiles

# Of an H100, as a block may have it at most; less what Mosaic keeps for barriers and its own scratch.
SHARED_MEMORY = 232_448 - 3_072
WARPGROUP_ROWS = 64  # what one wgmma multiplies at once
CHUNK_COLUMNS = 64  # what is stored at once: 128 bytes of 16-bit floats, the widest swizzle
CONSUMERS = 2  # warpgroups that multiply; a third one copies
WIDENED = 2  # tiles of 8-bit weights that a warpgroup has widened: one is multiplied, one written
_MOST_STAGES = 8


@dataclass(frozen=True, kw_only=True)
class MosaicTiles:
    """What one block computes at a time. None of it changes a row's dependence on others.

    Attributes:
      columns: of the result, in one warpgroup's tile, for each projection that it computes.
      depth: how much a pipeline step sums over; of "outer", rows.
      stages: pipeline steps whose copies are under way or waiting.
      walk: row tiles that follow one another before the next columns, so that weights are read again from L2.
    """

    columns: int
    depth: int
    stages: int
    walk: int

    def __post_init__(self) -> None:
        if self.columns not in (64, 128, 192, 256):
            raise ValueError(f"columns of Mosaic tiles must be 64, 128, 192 or 256, got {self.columns}")
        if self.depth not in (64, 128):
            raise ValueError(f"depth of Mosaic tiles must be 64 or 128, got {self.depth}")
        for name, least in (("stages", 2), ("walk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of Mosaic tiles must be at least {least}, got {getattr(self, name)}")


def row_groups(height: int) -> int:
    """Warpgroups side by side along the rows of a tile; the other consumers lie side by side along the columns."""
    return min(CONSUMERS, -(-height // WARPGROUP_ROWS))


def tiles_for(operation: Operation, problem: Problem) -> MosaicTiles:
    """The measured tiles, or the rule's.

    Raises:
      ValueError: the data file's tiles are none of Mosaic's.
    """
    return settle_tiles("mosaic", operation, problem, MosaicTiles, heuristic)


def heuristic(operation: Operation, problem: Problem) -> MosaicTiles:
    """Tiles by rule: as wide as registers hold where rows are many, narrow where few, to busy all multiprocessors."""
    many = operation == "outer" or tile_height(problem.tile_rows) > WARPGROUP_ROWS
    columns = 256 // _sums(operation) if many and problem.storage == "dense" else CHUNK_COLUMNS
    walk = 16 if many else 4
    return _fitted(operation, problem, MosaicTiles(columns=columns, depth=64, stages=_MOST_STAGES, walk=walk))


def candidates(operation: Operation, problem: Problem) -> Sequence[Tiles]:
    """What is worth measuring: the rule's tiles, and others that fit registers and shared memory."""
    found = [heuristic(operation, problem)]
    for columns in (64, 128, 192, 256):
        for depth in (64, 128) if operation != "outer" else (64,):
            for walk in (1, 4, 16):
                if columns * _sums(operation) <= 256:
                    tiles = MosaicTiles(columns=columns, depth=depth, stages=_MOST_STAGES, walk=walk)
                    found.append(_fitted(operation, problem, tiles))
    return [
        dataclasses.asdict(tiles)
        for tiles in dict.fromkeys(found)
        if shared_bytes(operation, tiles, problem) <= SHARED_MEMORY
    ]


def shared_bytes(operation: Operation, tiles: MosaicTiles, problem: Problem) -> int:
    """Shared memory of a block: the pipeline's stages of rows and weights, and results on their way out."""
    if operation == "outer":
        stage = (CONSUMERS * WARPGROUP_ROWS + tiles.columns) * tiles.depth * 2
        return tiles.stages * stage + CONSUMERS * WARPGROUP_ROWS * CHUNK_COLUMNS * 4
    along_rows = row_groups(tile_height(problem.tile_rows))
    one = _sums(operation) * tiles.columns * tiles.depth  # weights of a warpgroup's step
    stored = 2 if problem.storage == "dense" else 1
    stage = along_rows * WARPGROUP_ROWS * tiles.depth * 2 + CONSUMERS // along_rows * one * stored
    widened = 0 if problem.storage == "dense" else CONSUMERS * WIDENED * one * 2
    result = 4 if operation == "matmul" else 2  # gradients are float32
    return tiles.stages * stage + widened + 2 * CONSUMERS * WARPGROUP_ROWS * CHUNK_COLUMNS * result


def _sums(operation: Operation) -> int:
    """Projections that a kernel computes at once."""
    return 2 if operation == "gate_up" else 1


def _fitted(operation: Operation, problem: Problem, tiles: MosaicTiles) -> MosaicTiles:
    """The same, no wider than a small problem, with as many stages as shared memory holds."""
    width = problem.contract if operation in ("down", "outer") else problem.width
    tiles = dataclasses.replace(tiles, columns=min(tiles.columns, -(-width // CHUNK_COLUMNS) * CHUNK_COLUMNS))
    while tiles.stages > 2 and shared_bytes(operation, tiles, problem) > SHARED_MEMORY:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles
