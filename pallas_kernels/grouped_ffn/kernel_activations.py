"""The activations as Pallas kernels compute them.

Jax lowers no error function for Triton or Mosaic and, in 0.10.2, no `jax.nn.relu` for Mosaic.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS, UNGATED_ACTIVATIONS, Activation, gated
from pallas_kernels.grouped_ffn.problem import Problem

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; the error is at most 1.5e-7.
_SLOPE = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erfc_of_positive(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    t = 1.0 / (1.0 + _SLOPE * x)
    total = jnp.zeros_like(x)
    for coefficient in _COEFFICIENTS:
        total = (total + coefficient) * t
    return total * jnp.exp(-x * x)


def _gelu(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    half_tail = 0.5 * _erfc_of_positive(jnp.abs(x) * 0.5**0.5)
    return x * jnp.where(x < 0, half_tail, 1.0 - half_tail)


_OWN: dict[str, Activation] = {
    "gelu": _gelu,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
}

KERNEL_ACTIVATIONS: dict[str, Activation] = ACTIVATIONS | {name: gated(act) for name, act in _OWN.items()}
UNGATED_KERNEL_ACTIVATIONS: dict[str, Activation] = UNGATED_ACTIVATIONS | _OWN


def kernel_activation(problem: Problem) -> Activation:
    """The activation of a problem that has one."""
    return (KERNEL_ACTIVATIONS if problem.gated else UNGATED_KERNEL_ACTIVATIONS)[problem.activation or ""]
