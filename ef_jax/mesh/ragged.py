"""The exchange by `ragged_all_to_all`: a row moves only to where it is needed.

A token's row goes once to every device that serves one of its experts, and a row comes back for every expert. First all
devices along `expert` hear all ids and weights, a hundredth of the rows' bytes; so each knows, with no further
exchange, how much it gets from whom and where that is to lie.

What a server gets has a region of B * T rows for each source, filled from its front in the order of the source's
tokens. Results come back into M rows, in the order of servers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped, UInt

from ef_jax.mesh.routes import Run, alone, gather, servers, share
from ef_jax.runtime.steps import Routed


def send(routed: Routed, serves: Int32[Array, "X E"], run: Run = alone) -> Routed:
    """See `exchange.send`; the tokens of a source that are served here are at the front of its block."""
    (batch, tokens, k), hidden = routed.ids.shape, routed.h.shape[-1]
    sources, me, count = jax.lax.axis_size("expert"), jax.lax.axis_index("expert"), batch * tokens
    ids, weights = (part.reshape(sources, count, k) for part in gather([routed.ids, routed.weights]))
    places = _along_expert(servers(ids, serves))
    outgoing = (places[me][None] == jnp.arange(sources)[:, None, None]).any(axis=-1)  # [X servers, B * T]
    here = places == me
    incoming = here.any(axis=-1)  # [X sources, B * T]

    leaving = _true_first(outgoing.reshape(-1))[: count * min(k, sources)] % count
    rows = _exchange(
        routed.h.reshape(count, hidden)[leaving],
        jnp.zeros((sources * count, hidden), routed.h.dtype),
        _sizes(outgoing),
        jnp.full(sources, me * count, jnp.int32),
        _sizes(incoming),
        run,
    )
    h = rows.reshape(sources * batch, tokens, hidden)
    order = _true_first(incoming)[..., None]
    ids = jnp.take_along_axis(jnp.where(here, ids, -1), order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    return Routed(h, h, ids.reshape(-1, tokens, k), weights.reshape(-1, tokens, k))


def collect(
    outputs: UInt[Array, "R D"], routed: Routed, serves: Int32[Array, "X E"], run: Run = alone
) -> UInt[Array, "M D"]:
    """See `exchange.collect`; of the outputs' bits."""
    sources, me, k = jax.lax.axis_size("expert"), jax.lax.axis_index("expert"), routed.ids.shape[-1]
    (ids,) = gather([routed.ids])
    owners = servers(ids.reshape(sources, -1, k), serves)
    places = _along_expert(owners)
    here = places == me
    served = jnp.take_along_axis(here, _true_first(here.any(axis=-1))[..., None], axis=1)  # of each of `outputs`
    mine = places[me].reshape(-1)
    from_each = mine[None] == jnp.arange(sources)[:, None]  # [X servers, M]

    rows = _exchange(
        outputs[_true_first(served.reshape(-1))],
        jnp.zeros((len(mine), outputs.shape[-1]), outputs.dtype),
        _sizes(here.reshape(sources, -1)),
        _sizes(((places >= 0) & (places < me)).reshape(sources, -1)),
        _sizes(from_each),
        run,
    )
    arrived = jnp.cumsum(from_each.reshape(-1)).reshape(from_each.shape) - 1
    rows = rows[arrived[mine, jnp.arange(len(mine))]]
    server = owners[me].reshape(-1)
    return jnp.where((server >= 0)[:, None], share(rows, server), 0)


def _exchange(
    rows: Shaped[Array, "R D"],
    into: Shaped[Array, "Q D"],
    sizes: Int32[Array, " X"],
    places: Int32[Array, " X"],
    arriving: Int32[Array, " X"],
    run: Run,
) -> Shaped[Array, "Q D"]:
    """`into` with what others send: `sizes` rows in turn to each device, each part to its place there."""
    starts = jnp.cumsum(sizes) - sizes
    given = rows, into, starts, sizes, places, arriving
    return run(lambda given: jax.lax.ragged_all_to_all(*given, axis_name="expert"), given)


def _along_expert(owners: Int32[Array, "X n K"]) -> Int32[Array, "X n K"]:
    """Index along `expert` of servers with this device's index along `tensor`; -1 for others."""
    size = jax.lax.axis_size("tensor")
    ours = (owners >= 0) & (owners % size == jax.lax.axis_index("tensor"))
    return jnp.where(ours, owners // size, -1)


def _sizes(flags: Bool[Array, "X n"]) -> Int32[Array, " X"]:
    return flags.sum(axis=-1, dtype=jnp.int32)


def _true_first(flags: Bool[Array, "*sources n"]) -> Int32[Array, "*sources n"]:
    """Where the flags of the last axis are true, in order, then where not."""
    return jnp.argsort(~flags, axis=-1, stable=True)
