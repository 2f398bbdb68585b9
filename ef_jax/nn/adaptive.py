"""Fewer experts for tokens whose router is sure: those beyond a share of its weight are dropped."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ef_jax.nn.linear import along_last


def keep_share(
    ids: Int32[Array, "*rows K"], weights: Float[Array, "*rows K"], share: float, *, normalized: bool
) -> tuple[Int32[Array, "*rows K"], Float[Array, "*rows K"]]:
    """A token's experts of largest weight, as few as together have `share` of the weight of all K.

    Counting by share of what was chosen, and not by probability among all experts, it means the same for every router:
    sigmoids have no probabilities, and a softmax over many experts leaves small ones even to those that matter. Top-p
    routing (arXiv 2403.07652) is trained to be counted by; here it is a cut of a trained top-k.

    Args:
      ids: as the router chose them.
      weights: of each, not negative.
      share: above 0 to 1; 1 keeps all K.
      normalized: weights of a token have a sum of their own, which those that are left then have.

    Returns:
      Ids with -1 in place of those that are dropped, which come last, and weights, 0 there. Others keep their order; a
      token that loses none keeps its weights to the bit.
    """
    if share == 1:
        return ids, weights
    wide = weights.astype(jnp.float32)
    top_k = ids.shape[-1]
    mine, other = wide[..., :, None], wide[..., None, :]
    not_before = along_last(~jnp.tri(top_k, k=-1, dtype=bool), mine)
    behind = jnp.where((other < mine) | ((other == mine) & not_before), other, 0).sum(axis=-1)  # its own among them
    total = behind.max(axis=-1, keepdims=True)  # of the largest, which is never dropped
    dropped = (behind <= (1 - share) * total) & (behind < total)
    if normalized:
        kept = jnp.where(dropped, 0, wide).sum(axis=-1, keepdims=True)
        rescaled = (wide * (total / kept)).astype(weights.dtype)
        weights = jnp.where(dropped.any(axis=-1, keepdims=True), rescaled, weights)
    order = jnp.argsort(dropped, axis=-1, stable=True)
    ids, weights = jnp.where(dropped, -1, ids), jnp.where(dropped, 0, weights)
    return jnp.take_along_axis(ids, order, axis=-1), jnp.take_along_axis(weights, order, axis=-1)
