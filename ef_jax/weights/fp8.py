"""FP8 (e4m3) weights with a scale a block, back to the float dtype of their model."""

import numpy as np

from ef_jax.families._quantization import Fp8Blocks
from ef_jax.weights.dtypes import as_bytes

SCALE_SUFFIX = "_scale_inv"
"""`x.weight` has its scales in `x.weight_scale_inv`; a weight is its FP8 value times its block's scale."""

_SHIFT = np.int32(20)
_KEPT = np.uint32(0x87F00000).view(np.int32)
_BIAS = np.float32(2.0**120)
_TURN_ELEMENTS = 1 << 16  # the float32 intermediate stays in the cache of a core
_NAN = 0xFF


def dequantize(values: np.ndarray, scales: np.ndarray, blocks: Fp8Blocks, first_row: int, out: np.ndarray) -> None:
    """Fill `out` with `values x scales`, multiplied in float32 and rounded once: what transformers computes.

    Args:
      values: e4m3 as uint8 `[r, columns]`: rows `first_row` to `first_row + r` of a matrix.
      scales: float32 `[row blocks, column blocks]`, of the whole matrix.
      blocks: the blocks' size.
      first_row: of the matrix.
      out: `[r, columns]` of any float dtype.
    """
    rows, columns = values.shape
    whole = columns // blocks.columns * blocks.columns
    turn = max(1, _TURN_ELEMENTS // columns)
    buffer = np.empty((min(turn, rows), columns), np.int32)
    factors = scales * _BIAS
    if not np.isfinite(factors).all():  # scales of more than 128: none that a checkpoint is known to have
        factors = None
    for first in range(0, rows, turn):
        part = values[first : first + turn]
        bits = buffer[: len(part)]
        # The sign, four bits of exponent and three of mantissa land in a float32's places for them, at an exponent
        # that is 120 too low: the scale makes up for it, in the multiplication that there is anyway.
        np.left_shift(part.view(np.int8), _SHIFT, out=bits, dtype=np.int32)
        np.bitwise_and(bits, _KEPT, out=bits)
        floats = bits.view(np.float32)
        if factors is None:
            floats *= _BIAS
        of_rows = (scales if factors is None else factors)[(first_row + first + np.arange(len(part))) // blocks.rows]
        inner = floats[:, :whole].reshape(len(part), -1, blocks.columns)
        np.multiply(inner, of_rows[:, : inner.shape[1], None], out=inner)
        if whole < columns:
            floats[:, whole:] *= of_rows[:, -1:]
        out[first : first + turn] = floats


def has_nan(values: np.ndarray) -> bool:
    """Whether e4m3 values (contiguous, one byte each) hold NaN. There is no infinity in e4m3."""
    return bool(values.size) and int((as_bytes(values) | np.uint8(0x80)).max()) == _NAN
