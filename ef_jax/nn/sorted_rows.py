"""Rows sorted by expert, as grouped matmuls take them, and each token's outputs summed again."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def expert_order(ids: Int32[Array, "*rows K"], experts: int) -> tuple[Int32[Array, " M"], Int32[Array, " E"]]:
    """How the M rows of tokens times experts stand by expert, ties in token order, those of id -1 last.

    Returns:
      For each sorted row its place in the flat ids, and the rows of each expert.
    """
    flat = ids.reshape(-1)
    group = jnp.where(flat < 0, experts, flat)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(experts + 1, jnp.int32).at[group].add(1)[:experts]
    return order, sizes


def combine(
    outputs: Float[Array, "M D"], order: Int32[Array, " M"], weights: Float[Array, "*rows K"]
) -> Float[Array, "*rows D"]:
    """The weighted sum of each token's K expert outputs, given in sorted order."""
    return weighted_sum(unsorted(outputs, order).reshape(*weights.shape, outputs.shape[-1]), weights)


def unsorted(outputs: Float[Array, "M D"], order: Int32[Array, " M"]) -> Float[Array, "M D"]:
    """Rows, given in sorted order, in the order of the flat ids."""
    return jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)


def weighted_sum(outputs: Float[Array, "*rows K D"], weights: Float[Array, "*rows K"]) -> Float[Array, "*rows D"]:
    """Each token's K expert outputs times their weights, summed in the router's order, in f32."""
    per_token = outputs.astype(jnp.float32)
    scale = weights.astype(jnp.float32)[..., None]
    total = per_token[..., 0, :] * scale[..., 0, :]
    for k in range(1, weights.shape[-1]):
        total = total + per_token[..., k, :] * scale[..., k, :]
    return total.astype(outputs.dtype)
