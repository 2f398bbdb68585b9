"""The activations as Pallas kernels compute them.

Jax lowers no error function for Triton or Mosaic and, in 0.10.2, no `jax.nn.relu` for Mosaic.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS, Activation

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; the error is at most 1.5e-7.
_SLOPE = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erfc_of_positive(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    t = 1.0 / (1.0 + _SLOPE * x)
    total = jnp.zeros_like(x)
    for coefficient in _COEFFICIENTS:
        total = (total + coefficient) * t
    return total * jnp.exp(-x * x)


def _gelu(gate: Float32[Array, "*shape"], up: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    half_tail = 0.5 * _erfc_of_positive(jnp.abs(gate) * 0.5**0.5)
    return gate * jnp.where(gate < 0, half_tail, 1.0 - half_tail) * up


KERNEL_ACTIVATIONS: dict[str, Activation] = ACTIVATIONS | {
    "gelu": _gelu,
    "relu": lambda gate, up: jnp.maximum(gate, 0.0) * up,
    "relu2": lambda gate, up: jnp.square(jnp.maximum(gate, 0.0)) * up,
}
