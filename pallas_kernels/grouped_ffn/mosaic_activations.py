"""The activations as Mosaic kernels compute them: jax lowers neither an error function nor, in 0.10.2, a relu there."""

import jax.numpy as jnp

from pallas_kernels.grouped_ffn.activations import Activation
from pallas_kernels.grouped_ffn.triton_activations import KERNEL_ACTIVATIONS

MOSAIC_ACTIVATIONS: dict[str, Activation] = KERNEL_ACTIVATIONS | {
    "relu": lambda gate, up: jnp.maximum(gate, 0.0) * up,
    "relu2": lambda gate, up: jnp.square(jnp.maximum(gate, 0.0)) * up,
}
