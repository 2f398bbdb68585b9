"""An exponential whose bits do not depend on the shape of what it is taken of."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # exp of it is a normal number still
_COEFFICIENTS = [  # of Cephes' expf (S. L. Moshier), for |r| <= ln 2 / 2
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.5)
]


def invariant_exp(x: Float32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """exp(x) up to x = 88, to 1e-7 of it; below -87 as of -87.

    XLA:CPU takes another routine for `jnp.exp` in a vectorised loop than in another one, and which loops it vectorises
    depends on the size of the array, so that equal elements of two arrays can differ in the last bit (jax 0.10.2 and
    0.12). Multiplications and additions do not.
    """
    x = jnp.maximum(x, _LOWEST)
    k = jnp.round(x * _LOG2_E)
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p = jnp.full_like(r, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = p * r + coefficient
    power_of_two = jax.lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return (p * (r * r) + r + 1) * power_of_two
