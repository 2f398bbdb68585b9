"""What a gated network makes of its two projections, by name, in the accumulator's precision."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array, jax.Array], jax.Array]

CLAMP_LIMIT = 7.0
SWISH_SLOPE = 1.702


def _gated(act: Callable[[jax.Array], jax.Array]) -> Activation:
    return lambda gate, up: act(gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss: both projections clamped at 7 (the gate from above only), swish of slope 1.702, and one more `up`."""
    gate = jnp.minimum(gate, CLAMP_LIMIT)
    up = jnp.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * jax.nn.sigmoid(SWISH_SLOPE * gate) * (up + 1.0)


# Plain jax.numpy on arrays of any shape: the Pallas backends call these inside their kernels.
ACTIVATIONS: dict[str, Activation] = {
    "silu": _gated(jax.nn.silu),
    "gelu": _gated(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_tanh": _gated(lambda x: jax.nn.gelu(x, approximate=True)),
    "relu": _gated(jax.nn.relu),
    "relu2": _gated(lambda x: jnp.square(jax.nn.relu(x))),
    "clamped_swiglu": clamped_swiglu,
}
