"""What a network makes of its projections, by name, in the accumulator's precision."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_ffn.problem import Problem

Activation = Callable[..., jax.Array]
"""Of the gate's and the up projection; of blocks without a gate, of the up projection alone."""

CLAMP_LIMIT = 7.0
SWISH_SLOPE = 1.702


def gated(act: Activation) -> Activation:
    """`act(gate) * up`."""
    return lambda gate, up: act(gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss: both projections clamped at 7 (the gate from above only), swish of slope 1.702, and one more `up`."""
    gate = jnp.minimum(gate, CLAMP_LIMIT)
    up = jnp.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * jax.nn.sigmoid(SWISH_SLOPE * gate) * (up + 1.0)


# Plain jax.numpy on arrays of any shape: the Pallas backends call these inside their kernels.
UNGATED_ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

ACTIVATIONS: dict[str, Activation] = {
    **{name: gated(act) for name, act in UNGATED_ACTIVATIONS.items()},
    "clamped_swiglu": clamped_swiglu,
}


def activation_of(problem: Problem) -> Activation:
    """The activation of a problem that has one."""
    return (ACTIVATIONS if problem.gated else UNGATED_ACTIVATIONS)[problem.activation or ""]
