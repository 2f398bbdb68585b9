"""Shapes of the Triton backend's tiles: what was measured, and a rule where nothing was."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.quantized import is_packed
from pallas_kernels.grouped_ffn.tiles import Operation, Tiles, settle_tiles

# A tile of no more rows waits for the weights it reads; a higher one, for its multiplications.
FEW_ROWS = 32

# Shared memory that a block may have, by compute capability, in KiB; 99 for those that are not here.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_MOST_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class TritonTiles:
    """What one program computes, and by what.

    Attributes:
      columns: of the result, in each of a program's sums; of "outer", the rows of the result as well.
      depth: how much a step of the loop sums over, in stored elements (bytes of two weights for the 4-bit formats
        where the sum is over a block's columns); of "outer", in rows.
      warps: of 32 threads.
      stages: of the software pipeline: the steps that are loaded or multiplied at a time.
    """

    columns: int
    depth: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, least in (("columns", 16), ("depth", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} of Triton tiles must be a power of two and at least {least}, got {value}")
        if self.stages < 1:
            raise ValueError(f"stages of Triton tiles must be at least 1, got {self.stages}")


def tile_height(problem: Problem) -> int:
    """Rows of a tile inside the kernels: a power of two, and at least the 16 of a matrix instruction."""
    return max(16, 1 << (problem.tile_rows - 1).bit_length())


def tiles_for(operation: Operation, problem: Problem) -> TritonTiles:
    """The measured tiles, or the rule's.

    Raises:
      ValueError: the data file's tiles are none of Triton's.
    """
    return settle_tiles("triton", operation, problem, TritonTiles, heuristic)


def heuristic(operation: Operation, problem: Problem) -> TritonTiles:
    """Tiles by rule: narrow, with much in flight, where rows are few; as of a dense matmul where they are many."""
    height, sums = tile_height(problem), _sums(operation, problem)
    packed, quantized = is_packed(problem.storage), problem.storage != "dense"
    if operation == "outer":
        columns, depth, warps = (64, 32, 4) if problem.dtype.itemsize == 4 else (128, 64, 8)
    elif problem.dtype.itemsize == 4:  # multiplied without matrix instructions, out of registers
        columns, depth = 32 if quantized or height <= FEW_ROWS else 64 // sums, 16 if packed else 32
        warps = 4 if height <= FEW_ROWS else 8
    elif height <= FEW_ROWS:
        columns, warps = 32 if operation == "gate_up" else 64, 4
        long = (operation == "gate_up" and not packed) or (operation == "down" and not quantized)
        depth = 128 if long else 64
    else:  # dequantized weights pass through registers, so there are fewer at a time
        columns, depth, warps = (128 if height == 64 else 256) // sums, 32 if packed else 64, 4 if height == 64 else 8
    return _fitted(operation, problem, columns, depth, warps)


def candidates(operation: Operation, problem: Problem) -> Sequence[Tiles]:
    """What is worth measuring: the rule's tiles, and their neighbours that fit."""
    rule = heuristic(operation, problem)
    found = [rule]
    for columns in (rule.columns // 2, rule.columns, rule.columns * 2):
        for depth in (rule.depth // 2, rule.depth, rule.depth * 2):
            for warps in (4, 8):
                if columns >= 16 and 16 <= depth <= 256:
                    most = _fitted(operation, problem, columns, depth, warps)
                    found += [dataclasses.replace(most, stages=stages) for stages in range(2, most.stages + 1)]
    return [dataclasses.asdict(tiles) for tiles in dict.fromkeys(found)]


def _sums(operation: Operation, problem: Problem) -> int:
    """Sums that a program keeps: of gate and up, or of the two columns in a byte."""
    return 2 if operation == "gate_up" or is_packed(problem.storage) else 1


def _fitted(operation: Operation, problem: Problem, columns: int, depth: int, warps: int) -> TritonTiles:
    """Those sizes, made smaller for small problems, with as many stages as shared memory holds."""
    halves = 2 if is_packed(problem.storage) else 1
    hidden, width = problem.contract, problem.width
    if operation == "gate_up":
        along, across = hidden // halves, width
    elif operation == "down":
        along, across = width, hidden // halves
    else:  # either side of a block may be summed over; "outer" sums over rows
        along = across = min(hidden // halves, width)
    columns = min(columns, _power_of_two(across))
    if operation != "outer":
        depth = min(depth, _power_of_two(along))
        while along % depth and depth > 32:
            depth //= 2
    step = _step_bytes(operation, problem, columns, depth)
    shared = _SHARED_KIB.get(problem.target.capability or (0, 0), 99) * 1024
    return TritonTiles(columns=columns, depth=depth, warps=warps, stages=max(1, min(_MOST_STAGES, shared // step)))


def _step_bytes(operation: Operation, problem: Problem, columns: int, depth: int) -> int:
    """Bytes that a step loads."""
    size, stored = problem.dtype.itemsize, problem.dtype.itemsize if problem.storage == "dense" else 1
    if operation == "outer":
        return 2 * columns * depth * size
    packed = is_packed(problem.storage)
    lefts = 2 if packed and operation != "down" else 1
    return depth * (lefts * tile_height(problem) * size + (2 if operation == "gate_up" else 1) * columns * stored)


def _power_of_two(size: int) -> int:
    """The least that is not below `size`, and at least 16."""
    return max(16, 1 << (size - 1).bit_length())
