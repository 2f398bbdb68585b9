"""Rounds expert blocks to int8 and int4, on the host: what `pallas_kernels.lossy_quantize` does.

Symmetric, to nearest, scales from each group's largest magnitude. numpy, so that several threads round at a time and
no device is needed; and its divisions are exact to the last bit, which XLA's are not on every machine.
"""

from typing import Literal

import numpy as np

from ef_jax.spec import BlockFormat
from ef_jax.weights.dtypes import as_bits

IntFormat = Literal["int8", "int4"]

LARGEST: dict[IntFormat, int] = {"int8": 127, "int4": 7}
# Small enough for a core's cache, where a chunk stays through the five passes over it.
_CHUNK_WEIGHTS = 1 << 16


def quantize_block(plain: np.ndarray, of: BlockFormat, out: np.ndarray, to: BlockFormat) -> None:
    """Round one block.

    Args:
      plain: the block in floats, finite, as `of` says.
      of: the format of blocks that are not quantized.
      out: filled, as `to` says.
      to: the format of int8 or int4 blocks of that shape.
    """
    to.clear_gaps(out)
    source, target = of.split(plain), to.split(out)
    weights, values = source.pop("weights"), target.pop("values")
    for name, bias in source.items():
        as_bits(target[name])[...] = as_bits(bias)
    format: IntFormat = "int8" if values.dtype == np.int8 else "int4"
    width, hidden = weights.shape[1:]
    gate_up_scales, down_scales = target["gate_up_scales"], target["down_scales"]
    rows, row_scales = weights[:-1].reshape(-1, hidden), gate_up_scales.reshape(-1, gate_up_scales.shape[-1])
    row_values = values[:-1].reshape(len(rows), -1)
    step = max(1, _CHUNK_WEIGHTS // hidden)
    for first in range(0, len(rows), step):
        chunk = slice(first, first + step)
        wide = as_float32(rows[chunk])
        codes = _rounded(wide.reshape(len(wide), row_scales.shape[1], -1), row_scales[chunk][..., None], format)
        store_codes(codes.reshape(wide.shape), row_values[chunk])
    group = width // len(down_scales)
    for number, scales in enumerate(down_scales):
        chunk = slice(number * group, (number + 1) * group)
        codes = _rounded(as_float32(weights[-1, chunk]).T, scales[:, None], format)
        store_codes(codes.T, values[-1, chunk])


def as_float32(array: np.ndarray) -> np.ndarray:
    """The same floats in float32, in new memory."""
    if array.dtype.name != "bfloat16":
        return array.astype(np.float32)
    return (as_bits(array).astype(np.uint32) << 16).view(np.float32)


def store_codes(codes: np.ndarray, values: np.ndarray) -> None:
    """Write whole numbers `[..., D]`, in any dtype, as `values` of int8 `[..., D]` or of int4, uint8 `[..., D/2]`."""
    if values.dtype == np.int8:
        values[...] = codes
        return
    half = codes.shape[-1] // 2
    bits = codes.astype(np.int8).view(np.uint8)
    np.bitwise_or(bits[..., :half] & 15, bits[..., half:] << 4, out=values)


def _rounded(groups: np.ndarray, scales: np.ndarray, format: IntFormat) -> np.ndarray:
    """Whole numbers in the place of weights that share a scale along the last axis; fills their `scales` `[..., 1]`."""
    largest = np.maximum(groups.max(axis=-1, keepdims=True), -groups.min(axis=-1, keepdims=True))
    scales[...] = largest / np.float32(LARGEST[format])
    divisors = as_float32(scales)
    divisors[divisors == 0] = 1
    np.divide(groups, divisors, out=groups)
    np.rint(groups, out=groups)
    return np.clip(groups, -LARGEST[format], LARGEST[format], out=groups)
