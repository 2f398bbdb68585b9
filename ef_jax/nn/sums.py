"""Sums whose bits do not depend on the shape of what is summed."""

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, Float

_ADDED_AT_ONCE = 16


def row_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows 1"]:
    """The sum of each row, in the same order however many rows there are.

    XLA:CPU takes the elements of a sum in another order in a vectorised loop than in another one, and which loops it
    vectorises depends on the size of the array. It leaves alone what is added one by one.
    """
    while (length := x.shape[-1]) > 1:
        parts = min(_ADDED_AT_ONCE, length)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % parts)])
        width = x.shape[-1] // parts
        columns = [x[..., part * width : (part + 1) * width] for part in range(parts)]
        x = functools.reduce(operator.add, columns)
    return x


def tree_sum(x: Float[Array, "*dims"], axis: int) -> Float[Array, "*rest"]:
    """The sum along an axis, neighbours first: zeros at the end of the axis do not change a bit of it."""
    x = jnp.moveaxis(x, axis, 0)
    while len(x) > 1:
        if len(x) % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        x = x[0::2] + x[1::2]
    return x[0]
