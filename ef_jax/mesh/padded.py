"""The exchange by whole blocks: every device gets all tokens of its group, and gives all sources a row an expert.

It moves rows that nobody asked for, and runs on every platform.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt

from ef_jax.mesh.routes import Run, alone, gather, owner, servers, share
from ef_jax.runtime.steps import Routed


def send(routed: Routed, serves: Int32[Array, "X E"], run: Run = alone) -> Routed:
    """See `exchange.send`; tokens are where their sources have them."""
    h, ids, weights = gather([routed.h, routed.ids, routed.weights], run)
    ids = jnp.where(servers(ids, serves) == owner(), ids, -1)
    h, ids, weights = (part.reshape(-1, *part.shape[2:]) for part in (h, ids, weights))
    return Routed(h, h, ids, weights)


def collect(
    outputs: UInt[Array, "R D"], routed: Routed, serves: Int32[Array, "X E"], run: Run = alone
) -> UInt[Array, "M D"]:
    """See `exchange.collect`; of the outputs' bits."""
    blocks = outputs.reshape(jax.lax.axis_size("expert"), -1, outputs.shape[-1])
    back = run(
        lambda rows: jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0), blocks
    )  # [X servers, M, D]
    server = servers(routed.ids.reshape(1, -1), serves[jax.lax.axis_index("expert")][None])[0]
    mine = share(back[server // jax.lax.axis_size("tensor"), jnp.arange(len(server))], server)
    return jnp.where((server >= 0)[:, None], mine, 0)
