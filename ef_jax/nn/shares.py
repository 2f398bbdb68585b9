"""Where the shares of a dense part meet that devices along the mesh axis `tensor` compute each; inside `shard_map`.

A function of one share gives what it is given: programs of one device have no trace of it.
"""

import jax
from jaxtyping import Array, Float, Float32

from ef_jax.nn.sums import tree_sum

_AXIS = "tensor"

GATHERED_BYTES = 2**20
"""Parts up to this are sent whole to all devices, in one collective. Larger ones are summed piece by piece, which moves
`2 / shares` of the bytes in two. An estimate, at 450 GB/s and 10 us a collective: nothing was measured."""


def sum_shares(part: Float32[Array, "*rows D"], shares: int) -> Float32[Array, "*rows D"]:
    """The sum of what all devices have, the same on each.

    In the order of the devices (`tree_sum`), not in that of an all-reduce, which differs from place to place in an
    array: a row's sum must not depend on the rows beside it. It is made in float32, before anything rounds it, so that
    it differs from one device's only by the order of a sum: by no more than `2**-23 * n` times the sum of the n
    products' absolute values. Where both are then rounded to 16 bits, they may fall on neighbours.
    """
    if shares == 1:
        return part
    if shares == 2 or part.nbytes <= GATHERED_BYTES or part.size % shares:
        return tree_sum(jax.lax.all_gather(part, _AXIS), axis=0)
    pieces = jax.lax.all_to_all(part.reshape(shares, -1), _AXIS, split_axis=0, concat_axis=0)  # one of each device
    return jax.lax.all_gather(tree_sum(pieces, axis=0), _AXIS, tiled=True).reshape(part.shape)


def join_shares(part: Float[Array, "*rows d"], shares: int) -> Float[Array, "*rows D"]:
    """What all devices have, side by side along the last axis."""
    return part if shares == 1 else jax.lax.all_gather(part, _AXIS, axis=part.ndim - 1, tiled=True)


def own_share(whole: Float[Array, "*rows D"], shares: int) -> Float[Array, "*rows d"]:
    """What `join_shares` would make the whole of."""
    if shares == 1:
        return whole
    width = whole.shape[-1] // shares
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(_AXIS) * width, width, axis=-1)
