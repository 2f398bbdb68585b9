"""FP8 blocks as DeepSeek-V3 and others are released: e4m3 values, a float32 scale for each 128 x 128 of a matrix.

The blocks at the end of a matrix may be cut short. Since they are square, the scales of a transposed matrix are the
transposed scales.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

FP8_BLOCK = 128
_LARGEST = 448.0


def scales_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix."""
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def decode_e4m3(stored: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The values, before scaling; fit for use in a kernel. The two codes of NaN give 480 and -480.

    Sign, four bits of exponent and three of mantissa go to their places in a float16, whose exponents begin 2^8 lower.
    A float32's places would do as well, but for programs that take its subnormal numbers for zeros.
    """
    wide = stored.astype(jnp.int32)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * 2.0**8


def scale_of_each(scales: Float32[Array, "*lead r c"], rows: int, columns: int) -> Float32[Array, "*lead rows columns"]:
    """The scale of every weight of matrices."""
    lead, (r, c) = scales.shape[:-2], scales.shape[-2:]
    spread = jnp.broadcast_to(scales[..., :, None, :, None], (*lead, r, FP8_BLOCK, c, FP8_BLOCK))
    return spread.reshape(*lead, r * FP8_BLOCK, c * FP8_BLOCK)[..., :rows, :columns]


def encode_e4m3(
    weights: Float[Array, "*lead rows columns"],
) -> tuple[UInt8[Array, "*lead rows columns"], Float32[Array, "*lead r c"]]:
    """Values and scales of the nearest FP8 matrices; each scale takes its block's largest magnitude to e4m3's."""
    *lead, rows, columns = weights.shape
    r, c = scales_shape(rows, columns)
    beyond = [(0, 0)] * len(lead) + [(0, r * FP8_BLOCK - rows), (0, c * FP8_BLOCK - columns)]
    blocks = jnp.pad(jnp.abs(weights), beyond).reshape(*lead, r, FP8_BLOCK, c, FP8_BLOCK)
    scales = blocks.max(axis=(-3, -1)).astype(jnp.float32) / _LARGEST
    each = scale_of_each(jnp.where(scales == 0, 1.0, scales), rows, columns)
    values = jnp.clip(weights / each, -_LARGEST, _LARGEST).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(values, jnp.uint8), scales
