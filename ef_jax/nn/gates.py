"""Gates whose bits do not depend on the shape of what they are taken of; see `invariant_exp`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from ef_jax.nn.exponential import invariant_exp

# Of 2 atanh(s) / s in powers of s^2, the highest first; for s <= 1/3 what is left out is below 1e-9 of the sum.
_ATANH_COEFFICIENTS = [np.float32(2 / (2 * n + 1)) for n in reversed(range(8))]


def sigmoid(x: Float32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """1 / (1 + exp(-x)), to 3e-7 of it."""
    small = invariant_exp(-jnp.abs(x))
    return jnp.where(x < 0, small, 1) / (1 + small)


def silu(x: Float32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Float32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """log(1 + exp(x)), to 3e-7 of it."""
    small = invariant_exp(-jnp.abs(x))
    # log(1 + u) = 2 atanh(u / (2 + u)): no digits are lost where u is small.
    s = small / (2 + small)
    square = s * s
    series = jnp.full_like(s, _ATANH_COEFFICIENTS[0])
    for coefficient in _ATANH_COEFFICIENTS[1:]:
        series = series * square + coefficient
    return jnp.maximum(x, 0) + s * series
