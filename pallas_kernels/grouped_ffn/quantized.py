"""Expert blocks of 8 and 4 bits a weight: what is stored, and what it means.

A block is `[3, F, D]` as ever, so that it is read by the same indices as a dense one. Scales belong to groups of
consecutive weights along the axis that a matmul sums over: D for gate and up, F for the transposed down projection.
4-bit formats put two columns in a byte, column d in the low half and column d + D/2 in the high half, so that a kernel
gets two tiles of weights from a tile of bytes without a shuffle.

| format | weight | scale |
| --- | --- | --- |
| int8 | two's complement, -127 to 127 | float32, one an output channel |
| int4 | two's complement, -7 to 7 | bfloat16, one a group |
| mxfp4 | E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives | E8M0: 2^(byte - 127), one for 32 weights |
| fp8 | E4M3 (`fp8.py`) | float32, one for each 128 x 128 of a matrix |

mxfp4 is the OCP Microscaling format, in which gpt-oss ships, and fp8 is what DeepSeek-V3 and others ship in; storing
such a checkpoint so loses nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from pallas_kernels.grouped_ffn.fp8 import FP8_BLOCK, decode_e4m3, encode_e4m3, scale_of_each, scales_shape

Format = Literal["int8", "int4", "mxfp4", "fp8"]

FORMATS: tuple[Format, ...] = ("int8", "int4", "mxfp4", "fp8")
MXFP4_GROUP = 32
_SCALE_DTYPES = {"int8": "float32", "int4": "bfloat16", "mxfp4": "uint8", "fp8": "float32"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QuantizedPool:
    """Quantized expert blocks: a pytree of three arrays, of a slot pool or of any stack of blocks.

    Attributes:
      values: `[S, 3, F, D]` int8, or uint8 of fp8, or `[S, 3, F, D/2]` uint8 of the 4-bit formats.
      gate_up_scales: `[S, 2, F, D / group]`; the group of int8 is all of D. Of fp8 `[S, 2, F / 128, D / 128]`.
      down_scales: `[S, F / group, D]`; the group of int8 is all of F. Of fp8 `[S, F / 128, D / 128]`.
      format: of weights and scales, one of `FORMATS`.
    """

    values: Any
    gate_up_scales: Any
    down_scales: Any
    format: Format = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(S, 3, F, D)` of the weights that it stands for."""
        slots, parts, width, stored = self.values.shape
        return slots, parts, width, stored * (2 if is_packed(self.format) else 1)

    @property
    def groups(self) -> tuple[int, int]:
        """Weights that share a scale along the axis that is summed over, of gate and up and of down."""
        if self.format == "fp8":
            return FP8_BLOCK, FP8_BLOCK
        _, _, width, hidden = self.shape
        return hidden // self.gate_up_scales.shape[-1], width // self.down_scales.shape[-2]


def is_packed(format: str) -> bool:
    """Whether a byte holds two weights."""
    return format in ("int4", "mxfp4")


def check_quantized(pool: QuantizedPool) -> None:
    """Refuses arrays that do not fit together.

    Raises:
      ValueError: naming the array, its shape or dtype, and what would fit.
    """
    if pool.format not in FORMATS:
        raise ValueError(f"quantized format {pool.format!r} is not one of {', '.join(FORMATS)}")
    if pool.values.ndim != 4 or pool.values.shape[1] != 3:
        raise ValueError(f"values of a quantized pool must be [S, 3, F, D or D/2], got {pool.values.shape}")
    dtype = jnp.int8 if pool.format == "int8" else jnp.uint8
    if pool.values.dtype != dtype:
        raise ValueError(f"{pool.format} values must be {dtype.__name__}, got {pool.values.dtype}")
    slots, _, width, hidden = pool.shape
    if pool.format == "fp8":
        _check_fp8_scales(pool)
        return
    for name, scales, lead, contract in (
        ("gate_up_scales", pool.gate_up_scales, (slots, 2, width), hidden),
        ("down_scales", pool.down_scales, (slots, hidden), width),
    ):
        axis = -1 if name == "gate_up_scales" else -2
        count = scales.shape[axis] if scales.ndim >= 2 else 0
        rest = scales.shape[:-1] if axis == -1 else (*scales.shape[:-2], *scales.shape[-1:])
        if rest != lead or count < 1 or contract % count or (pool.format == "int8" and count != 1):
            raise ValueError(f"{name} {scales.shape} do not fit {pool.format} blocks of [3, {width}, {hidden}]")
        if scales.dtype != _SCALE_DTYPES[pool.format]:
            raise ValueError(f"{name} of {pool.format} must be {_SCALE_DTYPES[pool.format]}, got {scales.dtype}")
    if pool.format == "mxfp4" and pool.groups != (MXFP4_GROUP, MXFP4_GROUP):
        raise ValueError(f"mxfp4 has a scale for {MXFP4_GROUP} weights, got groups of {pool.groups}")


def _check_fp8_scales(pool: QuantizedPool) -> None:
    slots, _, width, hidden = pool.shape
    of_matrix = scales_shape(width, hidden)
    wanted = {"gate_up_scales": (slots, 2, *of_matrix), "down_scales": (slots, *of_matrix)}
    for name, shape in wanted.items():
        scales = getattr(pool, name)
        if scales.shape != shape or scales.dtype != jnp.float32:
            raise ValueError(f"{name} of fp8 must be float32 {list(shape)}, got {scales.dtype} {list(scales.shape)}")


def decode_halves(stored: UInt8[Array, "*shape"], format: Format) -> tuple[jax.Array, jax.Array]:
    """The float32 weights, before scaling, in the low and in the high halves of the bytes; fit for use in a kernel."""
    decode = _decode_int4 if format == "int4" else _decode_e2m1
    wide = stored.astype(jnp.int32)
    return decode(wide & 15), decode(wide >> 4)


def decode_scales(scales: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Scales as float32; E8M0 bytes become powers of two, 255 NaN. Fit for use in a kernel."""
    if scales.dtype != jnp.uint8:
        return scales.astype(jnp.float32)
    exponents = scales.astype(jnp.int32)
    # Exponent 0 means 2^-127, a subnormal: its bits are the mantissa's highest. 255 gives infinity's bits, so add one.
    bits = jnp.where(exponents == 0, 1 << 22, (exponents << 23) | (exponents == 255).astype(jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def dequantize(pool: QuantizedPool) -> Float[Array, "S 3 F D"]:
    """The float32 weights that `pool` stands for: `weight * scale`, exactly, but for the product's rounding."""
    gate_up, down = dequantize_apart(pool)
    return jnp.concatenate([gate_up, down[:, None]], axis=1)


def dequantize_apart(pool: QuantizedPool) -> tuple[Float[Array, "S 2 F D"], Float[Array, "S F D"]]:
    """`dequantize`, of gate and up and of down: where XLA:CPU has to take the whole apart again, it takes several times
    as long."""
    if pool.format == "fp8":
        scales = (pool.gate_up_scales, pool.down_scales)
        gate_up_scales, down_scales = (scale_of_each(of, *pool.shape[2:]) for of in scales)
        return decode_e4m3(pool.values[:, :2]) * gate_up_scales, decode_e4m3(pool.values[:, 2]) * down_scales
    if pool.format == "int8":
        weights = pool.values.astype(jnp.float32)
    else:
        weights = jnp.concatenate(decode_halves(pool.values, pool.format), axis=-1)
    gate_up_group, down_group = pool.groups
    gate_up = weights[:, :2] * jnp.repeat(decode_scales(pool.gate_up_scales), gate_up_group, axis=-1)
    down = weights[:, 2] * jnp.repeat(decode_scales(pool.down_scales), down_group, axis=-2)
    return gate_up, down


def lossy_quantize(blocks: Float[Array, "S 3 F D"], format: Format, *, group: int = 32) -> QuantizedPool:
    """Blocks rounded to `format`: symmetric, to nearest, scales from each group's largest magnitude.

    Lossy, but for weights that already are multiples of such scales.

    Args:
      blocks: any float dtype.
      format: one of `FORMATS`.
      group: weights that share a scale, of int4; divides D/2 and F. The other formats leave no choice.

    Raises:
      ValueError: the group does not divide the sizes.
    """
    if format not in FORMATS:
        raise ValueError(f"quantized format {format!r} is not one of {', '.join(FORMATS)}")
    wide = jnp.asarray(blocks).astype(jnp.float32)
    slots, _, width, hidden = wide.shape
    if format == "fp8":
        values, scales = encode_e4m3(wide)
        return QuantizedPool(values=values, gate_up_scales=scales[:, :2], down_scales=scales[:, 2], format=format)
    if format == "int8":
        in_groups = (hidden, width)
    else:
        size = MXFP4_GROUP if format == "mxfp4" else group
        if hidden % (2 * size) or width % size:
            raise ValueError(f"groups of {size} do not divide half of D {hidden} and F {width}")
        in_groups = (size, size)
    gate_up = wide[:, :2].reshape(slots, 2, width, -1, in_groups[0])
    down = wide[:, 2].reshape(slots, -1, in_groups[1], hidden)
    gate_up_scales = _scales(jnp.abs(gate_up).max(axis=-1), format)
    down_scales = _scales(jnp.abs(down).max(axis=-2), format)
    scaled = jnp.concatenate(
        [
            _divide(gate_up, decode_scales(gate_up_scales)[..., None]).reshape(slots, 2, width, hidden),
            _divide(down, decode_scales(down_scales)[:, :, None]).reshape(slots, 1, width, hidden),
        ],
        axis=1,
    )
    if format == "int8":
        values = jnp.clip(jnp.round(scaled), -127, 127).astype(jnp.int8)
    else:
        codes = _encode_e2m1(scaled) if format == "mxfp4" else jnp.clip(jnp.round(scaled), -7, 7).astype(jnp.int32) & 15
        values = (codes[..., : hidden // 2] | (codes[..., hidden // 2 :] << 4)).astype(jnp.uint8)
    return QuantizedPool(values=values, gate_up_scales=gate_up_scales, down_scales=down_scales, format=format)


def _divide(values: jax.Array, scales: jax.Array) -> jax.Array:
    return values / jnp.where(scales == 0, 1.0, scales)


def _scales(largest: Float[Array, "*shape"], format: Format) -> Shaped[Array, "*shape"]:
    if format == "mxfp4":  # as OCP MX says: the largest magnitude's power of two, less that of E2M1's largest, 4
        exponent = jnp.frexp(largest)[1] - 1 - 2
        return jnp.where(largest > 0, jnp.clip(exponent + 127, 0, 254), 0).astype(jnp.uint8)
    return (largest / (127 if format == "int8" else 7)).astype(_SCALE_DTYPES[format])


def _decode_int4(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Two's complement to float32: the code plus 8 becomes the last bits of 2^23's mantissa, which then goes off."""
    return jax.lax.bitcast_convert_type((codes ^ 8) | 0x4B000000, jnp.float32) - (2.0**23 + 8)


def _decode_e2m1(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Sign, two exponent bits and one of mantissa: those of a float16, whose exponents begin 2^14 lower."""
    bits = ((codes << 28) >> 19) & 0x8E00  # the sign goes to the front, and on copies of it that are masked away
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * 2.0**14


def _encode_e2m1(scaled: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Nearest E2M1 code, ties to even, larger magnitudes to 6."""
    magnitude = jnp.minimum(jnp.abs(scaled), 6.0)
    step = jnp.where(magnitude < 2.0, 0.5, jnp.where(magnitude < 4.0, 1.0, 2.0))
    rounded = jnp.round(magnitude / step) * step
    code = jnp.where(rounded < 2.0, rounded * 2.0, jnp.where(rounded < 4.0, rounded + 2.0, rounded / 2.0 + 4.0)).astype(
        jnp.int32
    )
    return code | jnp.where(jnp.signbit(scaled), 8, 0)
