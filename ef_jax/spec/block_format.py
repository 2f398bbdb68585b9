"""What an expert block is made of, byte by byte: the same in a converted checkpoint, on the host and on the link.

A block is one contiguous run of bytes. In most models it is one array of floats, the packed weights; quantized blocks
and those with biases are several arrays one after another, each on a boundary of 64 bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the names of the dtypes)
import numpy as np

_ALIGNMENT = 64
_MXFP4_GROUP = 32
_FP8_BLOCK = 128

_Contents = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockPart:
    """One array of a block: its name, shape and dtype, and its first byte.

    "uint8" are two 4-bit weights a byte, "float8_e8m0fnu" powers of two that scale them; "float8_e4m3fn" are weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """The arrays of a block, in order.

    A block as a whole is an array of `shape` and `dtype`: the array itself where there is only one, else flat, of the
    dtype that all of them have, or of bytes.
    """

    parts: tuple[BlockPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a block: up to a boundary of 64, unless it is one array."""
        end = self.parts[-1].end
        return end if len(self.parts) == 1 else _aligned(end)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a block as one array."""
        return self.parts[0].shape if len(self.parts) == 1 else (self.nbytes // self.dtype.itemsize,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a block as one array."""
        dtypes = {part.dtype for part in self.parts}
        return self.parts[0].dtype if len(dtypes) == 1 else np.dtype(np.uint8)

    def split(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of a block by name, as views of it: `block` is C-contiguous, of `shape` and `dtype`."""
        flat = block.reshape(-1).view(np.uint8)
        return {part.name: flat[part.offset : part.end].view(part.dtype).reshape(part.shape) for part in self.parts}

    def place(self, block: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
        """A view of the part of that name; of several parts of one shape, which follow one another, stacked; of the
        block itself if no part is named. `block` is as for `split`."""
        if not names:
            return block
        first, *others = (part for part in self.parts if part.name in names)
        if not others:
            return self.split(block)[first.name]
        strides = [first.dtype.itemsize * math.prod(first.shape[axis + 1 :]) for axis in range(len(first.shape))]
        return np.ndarray(
            (len(names), *first.shape),
            first.dtype,
            block.reshape(-1).view(np.uint8).data,
            first.offset,
            (others[0].offset - first.offset, *strides),
        )

    def clear_gaps(self, block: np.ndarray) -> None:
        """Zeros between the parts of a block and after the last."""
        flat = block.reshape(-1).view(np.uint8)
        ends = [part.end for part in self.parts]
        for end, start in zip(ends, [*(part.offset for part in self.parts[1:]), self.nbytes], strict=True):
            flat[end:start] = 0


@functools.lru_cache(maxsize=64)
def block_format(
    weights: tuple[int, int, int],
    dtype: str,
    *,
    quantization: str | None = None,
    group: int | None = None,
    bias: bool = False,
) -> BlockFormat:
    """The format of blocks of packed `weights` `[P, F, D]`, the last of the P matrices the transposed down projection.

    Args:
      weights: their shape.
      dtype: of weights that are not quantized, and of biases.
      quantization: how the weights are stored; None: as `dtype`.
      group: weights that share a scale, of "int4".
      bias: the projections, gate and up and down, have biases.
    """
    _, width, hidden = weights
    contents: _Contents = (("weights", weights, dtype),)
    if group is not None:
        contents = _int4(weights, group)
    elif quantization is not None:
        contents = _QUANTIZED[quantization](weights)
    if bias:
        contents += (("gate_bias", (width,), dtype), ("up_bias", (width,), dtype), ("down_bias", (hidden,), dtype))
    placed: list[BlockPart] = []
    for name, shape, kind in contents:
        offset = _aligned(placed[-1].end) if placed else 0
        placed.append(BlockPart(name=name, shape=shape, dtype=np.dtype(kind), offset=offset))
    return BlockFormat(parts=tuple(placed))


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT


def _mxfp4(weights: tuple[int, int, int]) -> _Contents:
    """Column d and column d + D/2 in a byte, a scale for 32 weights along the axis that is summed over."""
    parts, width, hidden = weights
    return (
        ("values", (parts, width, hidden // 2), "uint8"),
        ("gate_up_scales", (parts - 1, width, hidden // _MXFP4_GROUP), "float8_e8m0fnu"),
        ("down_scales", (width // _MXFP4_GROUP, hidden), "float8_e8m0fnu"),
    )


def _int8(weights: tuple[int, int, int]) -> _Contents:
    """A scale for an output channel."""
    parts, width, hidden = weights
    return (
        ("values", weights, "int8"),
        ("gate_up_scales", (parts - 1, width, 1), "float32"),
        ("down_scales", (1, hidden), "float32"),
    )


def _int4(weights: tuple[int, int, int], group: int) -> _Contents:
    """Packed as mxfp4, a scale for `group` weights along the axis that is summed over."""
    parts, width, hidden = weights
    return (
        ("values", (parts, width, hidden // 2), "uint8"),
        ("gate_up_scales", (parts - 1, width, hidden // group), "bfloat16"),
        ("down_scales", (width // group, hidden), "bfloat16"),
    )


def _fp8(weights: tuple[int, int, int]) -> _Contents:
    """A scale for 128 x 128 weights of a matrix; the last blocks may be cut short."""
    parts, width, hidden = weights
    blocks = (-(-width // _FP8_BLOCK), -(-hidden // _FP8_BLOCK))
    return (
        ("values", weights, "float8_e4m3fn"),
        ("gate_up_scales", (parts - 1, *blocks), "float32"),
        ("down_scales", blocks, "float32"),
    )


_QUANTIZED: dict[str, Callable[[tuple[int, int, int]], _Contents]] = {"mxfp4": _mxfp4, "int8": _int8, "fp8": _fp8}
