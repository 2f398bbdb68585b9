"""How expert blocks are stored in the slot pool: 16-bit floats as their bits (`uint16`), or quantized.

XLA:CPU rewrites `convert(dynamic_slice(pool))` to a slice of the whole converted pool, once a loop: measured on
jax 0.10.2, a 400 MB bfloat16 pool costs 197 ms a call that way against 3 ms as `uint16` (8 blocks of 3 MB read).
Integers are never converted, and turning a slice's bits back into floats is free.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels.grouped_ffn.quantized import QuantizedPool, dequantize

# `[S, 3, F, D]` floats or their bits, or quantized blocks. A plain matmul has `[S, P, A, B]` instead.
Pool = Shaped[Array, "S _ _ _"] | QuantizedPool


def storage_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Dtype that arrays of `dtype` have in host store and slot pool: `uint16` for 16-bit floats, `uint8` for 8-bit."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 2:
        return np.dtype(dtype)
    return np.dtype(f"uint{8 * dtype.itemsize}")


def to_storage(values: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The floats as they are stored, the inverse of `from_storage`; what is stored already stays as it is."""
    stored = storage_dtype(values.dtype)
    return values if values.dtype == stored else jax.lax.bitcast_convert_type(values, stored)


def from_storage(stored: Shaped[Array, "*shape"], dtype: jax.typing.DTypeLike) -> Float[Array, "*shape"]:
    """The same values as `dtype` floats; free inside a jitted program."""
    if stored.dtype == jnp.dtype(dtype):
        return stored
    return jax.lax.bitcast_convert_type(stored, dtype)


def weights_of_slot(pool: Pool, slot: jax.Array, dtype: jax.typing.DTypeLike) -> Float[Array, "P A B"]:
    """One slot's block as floats: of `dtype`, or float32 where the pool is quantized."""
    one = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, slot, 0), pool)
    if isinstance(one, QuantizedPool):
        return dequantize(one)[0]
    return from_storage(one[0], dtype)
