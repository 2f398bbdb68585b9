"""FP8 (e4m3) weights with a scale a block: to the float dtype of their model, and back."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.families import Fp8Blocks, fp8_blocks
from ef_jax.weights.dtypes import STORED_DTYPES, WEIGHT_DTYPES, as_bytes
from ef_jax.weights.layout import FP8_SCALES
from ef_jax.weights.safetensors import TensorEntry

FP8_CODE = "F8_E4M3"
SCALE_DTYPES = {code: STORED_DTYPES[code] for code in ("F32", "BF16", "F8_E8M0")}
"""What scales are stored in, all of which float32 holds exactly."""
_LEAST, _LARGEST = 2.0**-9, 448.0
_SHIFT = np.int32(20)
_KEPT = np.uint32(0x87F00000).view(np.int32)
_BIAS = np.float32(2.0**120)
_TURN_ELEMENTS = 1 << 16  # the float32 intermediate stays in the cache of a core
_NAN = 0xFF


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Weight:
    """How to read one FP8 weight: the name of its scales, `x.weight_scale_inv` for `x.weight`, and their blocks."""

    scales: str
    blocks: Fp8Blocks


def fp8_weights(
    config: Mapping[str, object], weights: Iterable[str], stored: Mapping[str, TensorEntry], path: Path
) -> dict[str, Fp8Weight]:
    """Which of a checkpoint's `weights` are FP8 with scales beside them; `stored` are all its tensors.

    Raises:
      CheckpointError: scales are missing or do not fit.
      UnsupportedError: the config describes FP8 that is not implemented.
    """
    blocks = fp8_blocks(config)
    found = {}
    for name in weights:
        if name in stored and stored[name].dtype == FP8_CODE:
            if blocks is None:
                raise CheckpointError(
                    f"{str(path)!r}: {name!r} is FP8, but config.json has no quantization_config of quant_method 'fp8'"
                )
            found[name] = Fp8Weight(scales=name + FP8_SCALES, blocks=blocks)
            _check_scales(name, stored[name], stored.get(found[name].scales), blocks, path)
    return found


def _check_scales(name: str, weight: TensorEntry, scales: TensorEntry | None, blocks: Fp8Blocks, path: Path) -> None:
    if len(weight.shape) != 2:
        raise CheckpointError(f"{str(path)!r}: {name!r} is FP8 of shape {list(weight.shape)}; only matrices may be")
    if scales is None:
        raise CheckpointError(f"{str(path)!r}: {name!r} is FP8, but its scales {name + FP8_SCALES!r} are missing")
    shape = blocks.scales_of(weight.shape)
    if scales.shape != shape or scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{str(path)!r}: the scales {name + FP8_SCALES!r} are {scales.dtype} {list(scales.shape)}, but"
            f" {list(weight.shape)} in blocks of {blocks.rows} x {blocks.columns} needs"
            f" {' or '.join(SCALE_DTYPES)} {list(shape)}"
        )


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
    split = not np.isfinite(factors).all()  # scales of more than 128: none that a checkpoint is known to have
    if split:
        factors = scales
    for first in range(0, rows, turn):
        part = values[first : first + turn]
        bits = buffer[: len(part)]
        # The sign, four bits of exponent and three of mantissa land in a float32's places for them, at an exponent
        # that is 120 too low: the scale makes up for it, in the multiplication that there is anyway.
        np.left_shift(part.view(np.int8), _SHIFT, out=bits, dtype=np.int32)
        np.bitwise_and(bits, _KEPT, out=bits)
        floats = bits.view(np.float32)
        if split:
            floats *= _BIAS
        of_rows = factors[(first_row + first + np.arange(len(part))) // blocks.rows]
        inner = floats[:, :whole].reshape(len(part), -1, blocks.columns)
        np.multiply(inner, of_rows[:, : inner.shape[1], None], out=inner)
        if whole < columns:
            floats[:, whole:] *= of_rows[:, -1:]
        out[first : first + turn] = floats


def comes_back(scales: np.ndarray, dtype: str) -> bool:
    """Whether `quantize` finds the values again that `dequantize` gave in `dtype`, whatever they are.

    It does where no product is below the normal numbers or overflows: rounding changes those by a factor of 1 +- 2^-8
    at most, and e4m3's neighbours are a sixteenth apart.
    """
    limits = ml_dtypes.finfo(WEIGHT_DTYPES[dtype])
    magnitudes = np.abs(scales.astype(np.float64))
    least, largest = magnitudes.min() * _LEAST, magnitudes.max() * _LARGEST
    return bool(least >= limits.smallest_normal and largest < limits.max)


def quantize(weights: np.ndarray, scales: np.ndarray, blocks: Fp8Blocks, first_row: int) -> np.ndarray:
    """The e4m3 values, uint8 `[r, columns]`, that `dequantize` made `weights` of; see `comes_back`.

    Args:
      weights: `[r, columns]` of any float dtype.
      scales, blocks, first_row: as of `dequantize`.
    """
    rows, columns = (np.arange(size) for size in weights.shape)
    values = np.empty(weights.shape, ml_dtypes.float8_e4m3fn)
    turn = max(1, _TURN_ELEMENTS // len(columns))
    for first in range(0, len(rows), turn):
        part = slice(first, first + turn)
        of_rows = scales[(first_row + rows[part]) // blocks.rows]
        values[part] = weights[part].astype(np.float32) / of_rows[:, columns // blocks.columns]
    return values.view(np.uint8)


def has_nan(values: np.ndarray) -> bool:
    """Whether e4m3 values (contiguous, one byte each) hold NaN. There is no infinity in e4m3."""
    return bool(values.size) and int((as_bytes(values) | np.uint8(0x80)).max()) == _NAN
