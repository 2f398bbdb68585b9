"""Runs of Hugging Face tensors, and their places in our arrays."""

import dataclasses
from types import EllipsisType
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of one Hugging Face tensor and its place in one of our arrays, or in one of a block's parts.

    Attributes:
      tensor: the tensor's name.
      start: first element of the run in the tensor.
      shape: of the run, in any split of its axes that suits.
      of: shape of the whole tensor; None: the run is all of it, in its own shape.
      where: index of our array that selects the run's place.
      axes: the place's axes in the order of the run's; None: as they are.
      parts: the part of a block; several of one shape are stacked. Empty: the array is the block.
      dtype: that the run is held in, where it is not the model's.
      codes: the run has 4-bit codes, which a block has in other places: of its rows, or of its columns (`mxfp4.py`).
    """

    tensor: str
    start: int = 0
    shape: tuple[int, ...]
    of: tuple[int, ...] | None = None
    where: int | slice | EllipsisType = ...
    axes: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ()
    dtype: Literal["float32", "float8_e4m3fn", "uint8"] | None = None
    codes: Literal["rows", "columns"] | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.shape if self.of is None else self.of

    def view(self, array: np.ndarray) -> np.ndarray:
        """The run's place in our `array`, shaped as the run is, or as the run's transpose where `codes` are columns."""
        place = array[self.where]
        return place if self.axes is None else place.transpose(self.axes)


TRANSPOSED = (1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArraySource:
    """One of our arrays: its shape, the pieces that fill it, and its dtype where that is not the model's."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: Literal["float32"] | None = None


def whole(
    tensor: str,
    shape: tuple[int, ...],
    *,
    of: tuple[int, ...] | None = None,
    dtype: Literal["float32"] | None = None,
) -> ArraySource:
    """An array that is one tensor, perhaps with axes of one (`of`)."""
    return ArraySource(shape=shape, pieces=(Piece(tensor=tensor, shape=shape, of=of),), dtype=dtype)


def stacked(tensors: dict[str, int], rest: tuple[int, ...]) -> ArraySource:
    """An array of tensors one after the other, by name and rows; `rest` are their other axes."""
    pieces = []
    end = 0
    for name, count in tensors.items():
        pieces.append(Piece(tensor=name, shape=(count, *rest), where=slice(end, end + count)))
        end += count
    return ArraySource(shape=(end, *rest), pieces=tuple(pieces))


def packed(module: str, width: int, hidden: int, names: tuple[str, str, str]) -> ArraySource:
    """A dense network's block: gate, up, transposed down."""
    return ArraySource(
        shape=(3, width, hidden), pieces=block_pieces([f"{module}.{n}.weight" for n in names], width, hidden)
    )


def block_pieces(tensors: list[str], width: int, hidden: int) -> tuple[Piece, Piece, Piece]:
    """The pieces of a block whose gate, up and down are a tensor each."""
    gate, up, down = tensors
    return (
        Piece(tensor=gate, shape=(width, hidden), where=0),
        Piece(tensor=up, shape=(width, hidden), where=1),
        Piece(tensor=down, shape=(hidden, width), where=2, axes=TRANSPOSED),
    )
