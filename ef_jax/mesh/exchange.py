"""Routed tokens go to the devices that serve their experts, and the outputs come back; inside `shard_map`.

`send` gives every device the tokens that it serves, as `Routed` of all its group: token t of the source with index s on
the `expert` axis is in block s, and experts that the device does not serve are -1. `collect` brings each output back to
its token's device, in the order of the token's own ids: no sum is made on the way, so that what a token gets does not
depend on the placement.

Sequences are the same along `tensor`: there each device sends and serves for its own experts, and the outputs are
shared in `collect`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ef_jax.runtime.steps import Routed

Transport = Literal["padded", "ragged"]
"""How rows move: whole blocks to everybody, or only to where they are needed (`ragged_all_to_all`, on accelerators)."""


def send(routed: Routed, serves: Int32[Array, "X E"], *, transport: Transport = "padded") -> Routed:
    """What this device serves of its group's tokens.

    Args:
      routed: of this device's own tokens, `[B, T, ...]`.
      serves: owner number of the device that computes each expert for the tokens of each index of the `expert` axis.
      transport: how.

    Returns:
      `[X * B, T, ...]`, X the size of the `expert` axis; `x` is `h`.
    """
    whole = (jax.lax.all_gather(part, "expert", axis=0, tiled=True) for part in (routed.h, routed.ids, routed.weights))
    h, ids, weights = whole
    sources = jnp.repeat(jnp.arange(jax.lax.axis_size("expert")), routed.ids.shape[0])
    server = serves[sources[:, None, None], jnp.maximum(ids, 0)]
    return Routed(h, h, jnp.where(server == _owner(), ids, -1), weights)


def collect(
    outputs: Float[Array, "R D"], routed: Routed, serves: Int32[Array, "X E"], *, transport: Transport = "padded"
) -> Float[Array, "M D"]:
    """The outputs of this device's own tokens, from wherever they were computed.

    Args:
      outputs: of every `[X * B, T, K]` of what `send` gave, in that order; what was not served here is anything.
      routed: what `send` was given.
      serves: the same.
      transport: the same.

    Returns:
      One row for every id of `routed`, in order; zeros where it is -1.
    """
    sources = jax.lax.axis_size("expert")
    rows = outputs.reshape(sources, -1, outputs.shape[-1])
    back = jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0)  # [X servers, M, D]
    back = jax.lax.all_gather(back, "tensor", axis=1)  # [X, tensor, M, D]
    back = back.reshape(-1, *back.shape[2:])  # by owner
    ids = routed.ids.reshape(-1)
    server = serves[jax.lax.axis_index("expert"), jnp.maximum(ids, 0)]
    mine = back[server, jnp.arange(len(ids))]
    return jnp.where((ids >= 0)[:, None], mine, 0)


def _owner() -> Array:
    return jax.lax.axis_index("expert") * jax.lax.axis_size("tensor") + jax.lax.axis_index("tensor")
