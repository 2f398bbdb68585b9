"""Matrix products with weights stored `[out, in]`, as on disk, accumulated in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped

from ef_jax.nn.shares import sum_shares

MIN_ROWS = 8
"""A lone 16-bit row is padded to this height: XLA's CPU matrix-vector product is 4 to 20 times slower."""

_WEIGHT_FIRST_ROWS = 64


def matmul_f32(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float32[Array, "*rows O"]:
    """`x @ weight.T`, accumulated and returned in float32. A row's result does not depend on the other rows."""
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if flat.dtype.itemsize == 2 and rows < MIN_ROWS:
        flat = jnp.pad(flat, ((0, MIN_ROWS - rows), (0, 0)))
    # With few rows XLA's CPU matmul is up to 1.9 x faster with the large operand on the left; with many, slower.
    weight_first = flat.shape[0] < _WEIGHT_FIRST_ROWS
    left, right = (weight, flat) if weight_first else (flat, weight)
    y = jax.lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        precision=product_precision(flat.dtype),
        preferred_element_type=jnp.float32,
    )
    y = y.T if weight_first else y
    return y[:rows].reshape(*x.shape[:-1], weight.shape[0])


def product_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """What products of this dtype are to be computed with: GPUs take 10 bits of a float32 unless told not to."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(
    x: Float[Array, "*rows I"],
    weight: Float[Array, "O I"],
    bias: Float[Array, " O"] | None = None,
    *,
    shares: int = 1,
) -> Float[Array, "*rows O"]:
    """`x @ weight.T + bias` in x's dtype, rounded once from float32; `shares`: devices with a part of I each."""
    y = sum_shares(matmul_f32(x, weight), shares)
    if bias is not None:
        y = y + along_last(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


def along_last(array: Shaped[Array, "*last"], like: Array) -> Shaped[Array, "*ones_and_last"]:
    """The array with as many axes as `like`, to be broadcast along its last ones."""
    return jnp.expand_dims(array, range(like.ndim - array.ndim))


class Linear(nnx.Module):
    """`weight` [out, in] and, where asked, `bias` [out]; `shares`: devices with a part of the inputs each."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs, shares: int = 1
    ):
        self.shares = shares
        self.weight = normal_param((outputs, inputs), dtype, rngs)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...], shares=self.shares)


def normal_param(shape: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Param[Array]:
    """A parameter of standard deviation 0.02, the usual initialisation of these models."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
