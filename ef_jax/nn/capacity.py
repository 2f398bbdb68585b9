"""Expert capacity (Fedus et al. 2021, arXiv 2101.03961): an expert takes so many tokens of a sequence and no more."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def within_capacity(ids: Int32[Array, "B T K"], experts: int, capacity: int) -> Int32[Array, "B T K"]:
    """The ids, -1 where an earlier choice of the same sequence was the `capacity`-th of that expert already.

    A choice of -1 counts nowhere. What a token without an expert gets from its experts is zero.
    """
    flat = ids.reshape(ids.shape[0], -1)
    count = jnp.cumsum(jax.nn.one_hot(flat, experts, dtype=jnp.int32), axis=1)
    rank = jnp.take_along_axis(count, jnp.maximum(flat, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(rank <= capacity, flat, -1).reshape(ids.shape)
