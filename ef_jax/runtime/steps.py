"""The pure functions that the engine compiles: one decoder layer forward, with the experts before it.

A layer's program starts with the experts of the layer before (whose slots the host has just filled) and ends with its
own router, so that a layer costs one dispatch. Decoding keeps the experts inside that program; a prompt's chunk runs
them in waves of their own (`run_wave`) on rows sorted by expert.

Arrays of a layer travel as plain lists of leaves; modules are rebuilt inside the trace (`merge_layer`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.memory.slot_pool import Slots
from ef_jax.nn import (
    expert_order,
    keep_share,
    layer_definition,
    merge_finish,
    merge_layer,
    unsorted,
    weighted_sum,
    within_capacity,
)
from ef_jax.runtime.expert_kernels import DECODE_TILE_ROWS, PROMPT_TILE_ROWS, ExpertKernels
from ef_jax.runtime.slot_weights import slot_weights
from ef_jax.spec import LayerSpec, ModelSpec
from pallas_kernels import grouped_ffn

Leaves = Sequence[jax.Array]


class Routed(NamedTuple):
    """A layer between its router and its experts: residual, normed input, chosen experts (-1: none), weights."""

    x: Float[Array, "B T D"]
    h: Float[Array, "B T D"]
    ids: Int32[Array, "B T K"]
    weights: Float[Array, "B T K"]


class SortedRows(NamedTuple):
    """Routed rows in expert order: `rows[i]` is row `order[i]` of the flat `[B*T*K]` list; `sizes` rows an expert."""

    rows: Float[Array, "M D"]
    order: Int32[Array, "M"]
    sizes: Int32[Array, "E"]


def sort_rows(spec: ModelSpec, routed: Routed) -> SortedRows:
    """Rows of a chunk sorted by expert, ties in token order; padding rows come last."""
    order, sizes = expert_order(routed.ids, spec.experts.count)
    hidden = routed.h.reshape(-1, routed.h.shape[-1])
    rows = hidden[order // routed.ids.shape[-1]]
    return SortedRows(expert_inputs(spec, rows, routed.weights.reshape(-1)[order]), order, sizes)


def output_weights(spec: ModelSpec, routed: Routed) -> Float[Array, "B T K"]:
    """What each expert's output counts for in its token's sum: one where the weight has scaled the input."""
    return jnp.ones_like(routed.weights) if spec.experts.scale_input else routed.weights


def expert_inputs(spec: ModelSpec, rows: Float[Array, "M D"], weights: Float[Array, " M"]) -> Float[Array, "M D"]:
    """What experts read of routed rows: where the model has it so, the rows times their weights."""
    if not spec.experts.scale_input:
        return rows
    # Rounded before an expert reads them, in every program alike: XLA may leave out a conversion, but not this.
    info = jnp.finfo(rows.dtype)
    scaled = rows.astype(jnp.float32) * weights.astype(jnp.float32)[:, None]
    return jax.lax.reduce_precision(scaled, info.nexp, info.nmant).astype(rows.dtype)


def run_experts(
    spec: ModelSpec,
    kernels: ExpertKernels,
    routed: Routed,
    pool: Slots,
    slot_row: Int32[Array, "E"],
    out: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """Outputs of the routed experts of a decode step, straight from their slots.

    Experts that `slot_row` gives no slot (-1) leave their rows as `out` has them, so that a step can run the experts
    that are there before those that are still on their way; no row's result depends on which call computes it.

    Returns:
      One row a token and expert, in the order that `combine_step` takes them.
    """
    weights, biases = slot_weights(spec, pool)
    run = functools.partial(
        grouped_ffn,
        biases=biases,
        activation=spec.experts.activation,
        tile_rows=DECODE_TILE_ROWS,
        out=out,
        implementation=kernels.decode,
        target=kernels.target,
    )
    with jax.named_scope("experts"):
        if _single(routed):
            ids = routed.ids.reshape(-1)
            x = jnp.broadcast_to(routed.h.reshape(1, -1), (ids.shape[0], routed.h.shape[-1]))
            x = expert_inputs(spec, x, routed.weights.reshape(-1))
            return run(x, weights, jnp.where(ids < 0, -1, slot_row[ids]), None)
        rows = sort_rows(spec, routed)
        return run(rows.rows, weights, slot_row, rows.sizes)


def combine_step(spec: ModelSpec, routed: Routed, outputs: Float[Array, "M D"]) -> Float[Array, "B T D"]:
    """The weighted sum of each token's K outputs of `run_experts`."""
    ordered = in_order(spec, routed, outputs).reshape(*routed.ids.shape, -1)
    return weighted_sum(ordered, output_weights(spec, routed))


def in_order(spec: ModelSpec, routed: Routed, outputs: Float[Array, "M D"]) -> Float[Array, "M D"]:
    """The outputs of `run_experts` in the order of the routed ids."""
    return outputs if _single(routed) else unsorted(outputs, sort_rows(spec, routed).order)


def _single(routed: Routed) -> bool:
    """One token: its experts are distinct, so its rows need no sorting."""
    return routed.ids.shape[:2] == (1, 1)


def run_wave(
    spec: ModelSpec,
    kernels: ExpertKernels,
    rows: SortedRows,
    out: Float[Array, "M D"],
    pool: Slots,
    slot_row: Int32[Array, "E"],
) -> Float[Array, "M D"]:
    """Outputs of the experts that `slot_row` gives a slot; other rows keep what `out` holds."""
    weights, biases = slot_weights(spec, pool)
    with jax.named_scope("wave"):
        return grouped_ffn(
            rows.rows,
            weights,
            slot_row,
            rows.sizes,
            biases=biases,
            activation=spec.experts.activation,
            tile_rows=PROMPT_TILE_ROWS,
            out=out,
            implementation=kernels.prompt,
            target=kernels.target,
        )


def finish_experts(
    spec: ModelSpec, leaves: Leaves, routed: Routed, output: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The residual stream after an MoE layer; `leaves` are those of `finish_paths`."""
    return merge_finish(spec, leaves).finish(routed.x, routed.h, output)


def enter_layer(
    spec: ModelSpec,
    kind: LayerSpec,
    leaves: Leaves,
    x: Float[Array, "B T D"],
    cache: tuple[Array, ...],
    positions: Int32[Array, "B T"],
    reach: Int32[Array, "2"],
    span: int,
    rows: Int32[Array, " B"] | None = None,
    *,
    share: float | None = None,
    lift: Float32[Array, " E"] | None = None,
) -> tuple[Routed | Float[Array, "B T D"], tuple[Array, ...]]:
    """The mixer of a layer over the first `span` positions of the cache's `rows`, then its router, or its whole dense
    network.

    A run that may change what is chosen gives the `share` of `keep_share`, and the `lift` of `route`.

    Returns:
      `Routed` for an MoE layer, the residual stream for a dense one; and the layer's updated cache.
    """
    layer = merge_layer(layer_definition(spec, kind)[0], leaves)
    x, cache = layer.attend(x, cache, positions, reach, span, rows)
    if kind.ffn == "dense":
        return layer.finish(x, layer.ffn_input(x)), cache
    x = jax.lax.optimization_barrier(x)  # the router reads x as it is passed on, rounded
    h, ids, weights = layer.route(x, lift)
    if share is not None:
        ids, weights = keep_share(ids, weights, share, normalized=spec.router.normalizes)
    ids = jnp.where(positions[..., None] >= 0, ids, -1)
    if spec.router.capacity is not None and x.shape[1] > 1:
        ids = within_capacity(ids, spec.experts.count, spec.router.capacity)
    return Routed(x, h, ids, weights), cache
