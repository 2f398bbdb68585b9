"""Looking ahead inside a decode step's programs: what this layer knows of the experts that coming layers will use.

A program that ends with a router also takes the residual stream through the norms and routers of the next layers
(`pregate`), corrects the scores where there is a trained predictor, and leaves ids and scores in one small array, the
report, which the host reads in one go. The look ahead starts behind an optimization barrier: it never changes what the
layer computes. A run that weighs its misses has the router's weights in the report too, with a look ahead or without.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from ef_jax.errors import InputError
from ef_jax.nn import correction
from ef_jax.nn.correction import CommonLeaves, Correction, CorrectionSpec, SourceLeaves
from ef_jax.nn.pregate import RouterStack, pregate, router_stack_shapes, stack_routers
from ef_jax.predict.log_odds import highest, log_odds, to_bins, union
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.steps import Routed
from ef_jax.spec import ModelSpec

_ID_BYTES = 2  # expert ids travel as uint16; an inactive sequence's are 65535
_WEIGHT_BYTES = 4  # float32
_DIVERSITY_BYTES = 4

Together = Callable[[jax.Array], jax.Array]
"""Of an array `[B, ...]` of this device's sequences, that of all that a step runs."""


def _as_they_are(of_sequences: jax.Array) -> jax.Array:
    return of_sequences


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LookAheadSpec:
    """What the programs compute of coming layers: scores at `distances` distances, corrected where asked."""

    distances: int
    correction: CorrectionSpec | None = None


class Trained(NamedTuple):
    """What a trained correction adds to a look: what all sources share, and what is the source's own."""

    common: CommonLeaves
    source: SourceLeaves


class Look(NamedTuple):
    """Arguments of one program's look ahead, all on the device: the model's routers, the first MoE layer to score,
    what is added to the logits, and the trained parts (None where there are none) for the source."""

    stack: RouterStack
    first: Int32[Array, ""]
    shift: Float32[Array, "H E"]
    trained: Trained | None


class LookAhead:
    """The device arrays of an engine's look ahead.

    Args:
      model: the model.
      spec: what is computed.
      dense: the model's weights, for its norms and routers.
      rows: R, sequences that are held.
      sharding: where the arrays go.
      correction: the trained one, where `spec` has one.

    Attributes:
      spec: what is computed.
      looks: arguments for each source: the embedding of a new token, then each MoE layer.
      state: f32 `[R, W]` on the device, what the correction remembers of each sequence; programs donate it.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: LookAheadSpec,
        dense: DenseWeights,
        *,
        rows: int,
        sharding: jax.sharding.Sharding,
        correction: Correction | None = None,
    ) -> None:
        self.spec = spec
        self._rows, self._sharding = rows, sharding

        def place(tree: Any) -> Any:
            return jax.device_put(tree, sharding)

        layers = len(model.step_moe_layers)
        stack = stack_routers(model, dense.layers, spec.distances)
        unshifted = place(np.zeros((spec.distances, model.experts.count), np.float32))
        trained: list[Trained | None] = [None] * layers
        if correction is not None:
            common, sources = place(correction.common), correction.sources
            trained = [
                Trained(common, place(jax.tree.map(operator.itemgetter(source), sources))) for source in range(layers)
            ]
        self.looks = [  # past the last layer there is nothing to correct, but the program is the same
            Look(stack, place(np.int32(max(source - 1, 0))), unshifted, trained[min(source, layers - 1)])
            for source in range(layers + 1)
        ]
        self.reset()

    def shift(self, shifts: Float32[np.ndarray, "sources H E"]) -> None:
        """From now on add `shifts` to the logits of each source, see `residual_means.logit_shifts`.

        Raises:
          InputError: there is a trained correction, which was trained without them and knows as much.
        """
        if self.spec.correction is not None:
            raise InputError("a trained predictor takes no shift: it was trained on scores without one")
        self.looks = [
            look._replace(shift=jax.device_put(shift, self._sharding))
            for look, shift in zip(self.looks, shifts, strict=True)
        ]

    def reset(self) -> None:
        """Nothing is known of any sequence."""
        corrected = self.spec.correction
        shape = None if corrected is None else state_shape(corrected, self._rows)
        self.state = None if shape is None else jnp.zeros(shape.shape, shape.dtype, device=self._sharding)


class Report(NamedTuple):
    """What a program tells the host.

    Attributes:
      ids: the experts of each sequence, in batch order; none where no router ran.
      bins: how likely coming layers are to use each expert; row d is d layers ahead. None where nothing looks ahead.
      diversity: of the tokens chosen, see `token_diversity`; 0 where none were.
      weights: the router's weight of each of `ids`; None where the report has none.
    """

    ids: list[list[int]]
    bins: UInt8[np.ndarray, "H+1 E"] | None
    diversity: float = 0.0
    weights: list[list[float]] | None = None

    def without_dropped(self, experts: int) -> "Report":
        """The report without those of `ids` that are no expert, which come last in a row, and their weights."""
        ids = [[expert for expert in row if expert < experts] for row in self.ids]
        if self.weights is None:
            return self._replace(ids=ids)
        of_ids = [weights[: len(row)] for row, weights in zip(ids, self.weights, strict=True)]
        return self._replace(ids=ids, weights=of_ids)


def look_from_layer(
    model: ModelSpec,
    spec: LookAheadSpec,
    look: Look,
    routed: Routed,
    state: Float32[Array, "B W"] | None,
    *,
    weighed: bool = False,
    together: Together = _as_they_are,
) -> tuple[UInt8[Array, " n"], Float32[Array, "B W"] | None]:
    """The report of a decode step's MoE layer, `look.first`, and the state after it; while tracing.

    A `weighed` report has the router's weights in it. Reports are of the sequences that `together` gives, those of all
    devices where others have some.
    """
    with jax.named_scope("look_ahead"):
        x, ids = jax.lax.optimization_barrier((routed.x[:, 0], routed.ids[:, 0]))
        if spec.correction is not None and look.trained is not None and state is not None:
            state = correction.advance(spec.correction, look.trained.common, state, look.first, ids)
        shift = jnp.pad(look.shift, ((1, 0), (0, 0)))
        choice = pregate(model, look.stack, x, look.first, spec.distances + 1, shift)
        odds = log_odds(choice, model.experts.top_k, jnp)
        own, odds = odds[:, 0], odds[:, 1:]
        if spec.correction is not None and look.trained is not None and state is not None:
            odds = correction.correct(spec.correction, look.trained.source, choice[:, 1:], state)
        ids, own, odds = together(ids), together(own), together(odds)
        active = ids[:, 0] >= 0
        bins = to_bins(jnp.concatenate([highest(own, active, jnp)[None], union(odds, active, jnp)]), jnp)
        own_routes = report_routes(routed) if weighed else report_ids(ids)
        return jnp.concatenate([own_routes, bins.reshape(-1)]), state


def report_ids(ids: Int32[Array, "B K"]) -> UInt8[Array, " n"]:
    """The report of a layer in which nothing looks ahead and nothing is weighed: ids alone; while tracing."""
    return _as_bytes(ids.astype(jnp.uint16))


def report_routes(routed: Routed) -> UInt8[Array, " n"]:
    """The report of a decode step's MoE layer in which nothing looks ahead: ids and weights; while tracing."""
    ids, weights = jax.lax.optimization_barrier((routed.ids[:, 0], routed.weights[:, 0]))
    return jnp.concatenate([_as_bytes(ids.astype(jnp.uint16)), _as_bytes(weights.astype(jnp.float32))])


def look_from_token(
    model: ModelSpec,
    spec: LookAheadSpec,
    look: Look,
    embedded: Float[Array, "B D"],
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"],
    state: Float32[Array, "B W"] | None,
    *,
    together: Together = _as_they_are,
) -> tuple[UInt8[Array, " n"], Float32[Array, "B W"] | None]:
    """The report of newly chosen tokens, before the first layer runs on them, and their state; while tracing.
    `together` as for `look_from_layer`."""
    with jax.named_scope("look_ahead"):
        x, tokens = jax.lax.optimization_barrier((embedded, tokens))
        if spec.correction is not None and look.trained is not None and state is not None:
            state = correction.begin(spec.correction, look.trained.common, tokens, state)
        choice = pregate(model, look.stack, x, look.first, spec.distances, look.shift)
        odds = log_odds(choice, model.experts.top_k, jnp)
        if spec.correction is not None and look.trained is not None and state is not None:
            odds = correction.correct(spec.correction, look.trained.source, choice, state)
        x, odds, active = together(x), together(odds), together(active)
        bins = to_bins(union(odds, active, jnp), jnp)
        diversity = token_diversity(x, active)
        return jnp.concatenate([_as_bytes(diversity[None]), jnp.pad(bins, ((1, 0), (0, 0))).reshape(-1)]), state


def absorb_chunk(
    spec: LookAheadSpec | None, look: Look, state: Float32[Array, "B W"], ids: Int32[Array, "B T K"]
) -> Float32[Array, "B W"]:
    """A correction's state after MoE layer `look.first` has routed a prompt's chunk; while tracing."""
    if spec is None or spec.correction is None or look.trained is None:
        raise ValueError("there is no correction to remember a prompt for")
    return correction.absorb(spec.correction, look.trained.common, state, look.first, ids)


def read_report(model: ModelSpec, report: jax.Array | np.ndarray, batch: int, *, weighed: bool = False) -> Report:
    """What `look_from_layer` or `report_routes` left; waits for it."""
    raw = np.asarray(report)
    top_k, experts = model.experts.top_k, model.experts.count
    cut = _ID_BYTES * batch * top_k
    ids = raw[:cut].view(np.uint16).reshape(batch, top_k).tolist()
    weights = None
    if weighed:
        ids_end, cut = cut, cut + _WEIGHT_BYTES * batch * top_k
        all_weights = raw[ids_end:cut].view(np.float32).reshape(batch, top_k).tolist()
        weights = [weights for row, weights in zip(ids, all_weights, strict=True) if row[0] < experts]
    bins = raw[cut:].reshape(-1, experts) if cut < len(raw) else None
    return Report([row for row in ids if row[0] < experts], bins, weights=weights)


def read_token_report(model: ModelSpec, report: jax.Array | np.ndarray) -> Report:
    """What `look_from_token` left; waits for it."""
    raw = np.asarray(report)
    diversity = float(raw[:_DIVERSITY_BYTES].view(np.float32)[0])
    return Report([], raw[_DIVERSITY_BYTES:].reshape(-1, model.experts.count), diversity)


def token_diversity(embedded: Float[Array, "B D"], active: Bool[Array, " B"]) -> Float32[Array, ""]:
    """Sum over the pairs of active tokens of the squared distance of their embeddings: `k sum |v|^2 - |sum v|^2`.

    ExpertFlow-S (arXiv:2510.26730) takes it as a sign of how many different experts a batch will need.
    """
    rows = jnp.where(active[:, None], embedded.astype(jnp.float32), 0.0)
    return active.sum() * (rows * rows).sum() - (rows.sum(axis=0) ** 2).sum()


def look_shapes(model: ModelSpec, spec: LookAheadSpec, sharding: jax.sharding.Sharding) -> Any:
    """A `Look` of abstract arguments."""
    shapes = (
        router_stack_shapes(model, spec.distances),
        jax.ShapeDtypeStruct((), np.int32),
        jax.ShapeDtypeStruct((spec.distances, model.experts.count), np.float32),
        None if spec.correction is None else Trained(*correction.leaf_shapes(spec.correction)),
    )
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), Look._make(shapes))


def state_shape(spec: CorrectionSpec, rows: int) -> jax.ShapeDtypeStruct:
    """Of what a correction remembers of `rows` sequences."""
    return jax.ShapeDtypeStruct((rows, spec.state_width), np.float32)


def look_ahead_bytes(model: ModelSpec, spec: LookAheadSpec | None, rows: int) -> int:
    """Device bytes that a look ahead keeps for `rows` sequences."""
    if spec is None:
        return 0
    layers = len(model.step_moe_layers)
    arrays = jax.tree.leaves(router_stack_shapes(model, spec.distances))
    if spec.correction is not None:
        common, source = correction.leaf_shapes(spec.correction)
        arrays += [*common, *(list(source) * layers), state_shape(spec.correction, rows)]
    arrays.append(jax.ShapeDtypeStruct((layers + 1, spec.distances, model.experts.count), np.float32))
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _as_bytes(values: Array) -> UInt8[Array, " n"]:
    return jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(-1)
