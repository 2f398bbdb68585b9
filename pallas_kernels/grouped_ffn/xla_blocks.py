"""One expert block, or a part of its width, out of the pool and in the rows' dtype: what the XLA backend multiplies.

Quantized weights are decoded as they are sliced. Those of 4 bits give two arrays, one for each half of the columns:
to put them together would cost as much as to decode them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.quantized import (
    Format,
    QuantizedPool,
    decode_halves,
    decode_scales,
    dequantize_apart,
    is_packed,
)
from pallas_kernels.grouped_ffn.storage import Pool, from_storage, to_storage


class BlockPart(NamedTuple):
    """Rows of an expert's projections, and the same rows of its transposed down projection.

    Attributes:
      inward: `[P * width, columns]` arrays, one for each run of columns.
      down: `[width, columns]` arrays, likewise.
    """

    inward: tuple[Float[Array, "rows columns"], ...]
    down: tuple[Float[Array, "width columns"], ...]


def fits(pool_groups: tuple[int, int] | None, width: int, parts: int) -> bool:
    """Whether a block can be taken in so many parts of its width, quantized weights in whole groups unless they all
    share a scale."""
    if width % parts:
        return False
    return pool_groups is None or parts == 1 or pool_groups[1] == width or width // parts % pool_groups[1] == 0


def load_part(
    pool: Pool, slot: jax.Array, part: jax.Array | int, *, parts: int, dtype: jax.typing.DTypeLike
) -> BlockPart:
    """One of the `parts` of a slot's block."""
    if isinstance(pool, QuantizedPool):
        return _decoded(_sliced(pool, slot, part, parts), dtype)
    projections, width, hidden = pool.shape[1] - 1, pool.shape[2] // parts, pool.shape[3]
    inward = jax.lax.dynamic_slice(pool, (slot, 0, part * width, 0), (1, projections, width, hidden))
    down = jax.lax.dynamic_slice(pool, (slot, projections, part * width, 0), (1, 1, width, hidden))
    inward, down = from_storage(inward, dtype), from_storage(down, dtype)
    return BlockPart((inward.reshape(projections * width, hidden),), (down.reshape(width, hidden),))


def load_biases(biases: ExpertBiases, slot: jax.Array, part: jax.Array | int, width: int) -> ExpertBiases:
    """A slot's biases in float32, `[1, width]` of the part and `[1, D]`, which are zeros but for the first part.

    They are sliced as bits: XLA:CPU would convert those of all slots.
    """

    def row(of: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        bits = jax.lax.dynamic_slice(to_storage(of), (slot, start), (1, size))
        return from_storage(bits, of.dtype).astype(jnp.float32)

    gate, up = (row(of, part * width, width) for of in biases[:2])
    return ExpertBiases(gate, up, jnp.where(part == 0, row(biases.down, 0, biases.down.shape[1]), 0.0))


def _sliced(pool: QuantizedPool, slot: jax.Array, part: jax.Array | int, parts: int) -> QuantizedPool:
    """The part as a pool of one slot. Scales of 16 bits are sliced as bits, as biases are."""

    def along(array: jax.Array, axis: int) -> jax.Array:
        sizes = [1, *array.shape[1:]]
        starts: list[jax.Array | int] = [slot, *(0,) * (array.ndim - 1)]
        if sizes[axis] > 1:
            sizes[axis] //= parts
            starts[axis] = part * sizes[axis]
        run = jax.lax.dynamic_slice(to_storage(array), starts, sizes)
        return run if run.dtype == array.dtype else from_storage(run, array.dtype)

    return QuantizedPool(
        values=along(pool.values, 2),
        gate_up_scales=along(pool.gate_up_scales, 2),
        down_scales=along(pool.down_scales, 1),
        format=pool.format,
    )


def _decoded(block: QuantizedPool, dtype: jax.typing.DTypeLike) -> BlockPart:
    _, _, width, hidden = block.shape
    of_columns, of_rows = block.groups
    if not is_packed(block.format) or hidden // 2 % of_columns:
        gate_up, outward = dequantize_apart(block)
        return BlockPart((gate_up.astype(dtype).reshape(-1, hidden),), (outward[0].astype(dtype),))
    halves = decode_halves(block.values[0], block.format)
    inward_scales = jnp.split(decode_scales(block.gate_up_scales[0]), 2, axis=-1)
    down_scales = jnp.split(decode_scales(block.down_scales[0]), 2, axis=-1)
    inward, down = [], []
    for half, columns, rows in zip(halves, inward_scales, down_scales, strict=True):
        grouped = half[:-1].reshape(-1, width, hidden // 2 // of_columns, of_columns)
        inward.append(_narrowed(grouped * columns[..., None], block.format, dtype).reshape(-1, hidden // 2))
        grouped = half[-1].reshape(width // of_rows, of_rows, hidden // 2)
        down.append(_narrowed(grouped * rows[:, None], block.format, dtype).reshape(width, hidden // 2))
    return BlockPart(tuple(inward), tuple(down))


def _narrowed(weights: Float32[Array, "*shape"], format: Format, dtype: jax.typing.DTypeLike) -> Float[Array, "*shape"]:
    """The weights in `dtype`. Those of mxfp4 are exact in bfloat16, and XLA:CPU rounds three times as slowly as it cuts
    off."""
    if format != "mxfp4" or dtype != jnp.bfloat16:
        return weights.astype(dtype)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
