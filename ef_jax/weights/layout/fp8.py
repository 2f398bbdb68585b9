"""Where experts in FP8 lie: a tensor of values and one of scales for each projection."""

from types import EllipsisType

from ef_jax.families import FP8_AS_RELEASED
from ef_jax.weights.layout.pieces import TRANSPOSED, Piece

FP8_SCALES = "_scale_inv"
"""What the name of the scales adds to that of the weight."""


def fp8_pieces(tensors: list[str], width: int, hidden: int) -> tuple[Piece, ...]:
    """The pieces of a block whose gate, up and down are `tensors`."""
    gate, up, down = tensors
    inward, outward = (FP8_AS_RELEASED.scales_of(shape) for shape in ((width, hidden), (hidden, width)))
    return (
        *(_values(tensor, (width, hidden), part) for part, tensor in enumerate((gate, up))),
        _values(down, (hidden, width), 2, TRANSPOSED),
        *(_scales(tensor, inward, "gate_up_scales", part) for part, tensor in enumerate((gate, up))),
        _scales(down, outward, "down_scales", ..., TRANSPOSED),
    )


def _values(tensor: str, shape: tuple[int, int], part: int, axes: tuple[int, ...] | None = None) -> Piece:
    return Piece(tensor=tensor, shape=shape, where=part, axes=axes, parts=("values",), dtype="float8_e4m3fn")


def _scales(
    tensor: str, shape: tuple[int, int], part: str, where: int | EllipsisType, axes: tuple[int, ...] | None = None
) -> Piece:
    return Piece(tensor=tensor + FP8_SCALES, shape=shape, where=where, axes=axes, parts=(part,), dtype="float32")
