"""The learned correction of pre-gate scores: a small network a source, run inside the engine's programs.

A source is a point of a token's way at which experts further on are predicted: source 0 is the token's embedding,
source l + 1 the residual stream that router l reads. From source s, distance d = 1 to H aims at MoE layer s - 1 + d;
distances past the last layer mean nothing. A source's network sees the pre-gate scores of all H distances together,
which tell far more of the residual stream than one row of them, the token's id, the experts that its past layers chose,
and what the sequence's earlier tokens used in the layers aimed at. The last three are kept in a state of fixed size, a
sum of embeddings and of decayed counts: nothing learned stands between one token's state and the next's, so training
is parallel over tokens.

After ExpertFlow-S (arXiv 2510.26730), whose random forest on the CPU takes the first three; here the earlier tokens are
added and the network runs on the device.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.errors import InputError
from ef_jax.nn.linear import along_last, matmul_f32, normal_param

_LIMIT = 8.0
_LEAST_STD = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionSpec:
    """What a correction is built for.

    Attributes:
      layers: L, MoE layers, and sources that predict.
      experts: E, experts a layer.
      top_k: K, experts a token.
      distances: H, layers ahead that a source predicts.
      vocab: V.
      width: r, hidden units of a source's network and length of the embeddings.
      decays: of the counts of the experts that earlier tokens used, one count each: a token's weight falls by this
        factor with every later token; 0 is the previous token alone.

    Raises:
      InputError: a size below 1, more experts a token than there are, or a decay outside [0, 1).
    """

    layers: int
    experts: int
    top_k: int
    distances: int
    vocab: int
    width: int = 64
    decays: tuple[float, ...] = (0.0, 0.9)

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "distances", "vocab", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"a correction's {name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.experts:
            raise InputError(f"a correction for {self.top_k} experts a token needs as many, got {self.experts}")
        if not self.decays or not all(0 <= decay < 1 for decay in self.decays):
            raise InputError(f"a correction's decays must be one or more numbers from 0 to below 1, got {self.decays}")

    @property
    def state_width(self) -> int:
        """W, numbers that a sequence's state holds."""
        return 1 + 3 * self.width + len(self.decays) * self._rows * self.experts

    @property
    def columns(self) -> dict[str, slice]:
        """Which columns of a source's first matrix take which input."""
        scores = self.distances * self.experts
        sizes = {"scores": scores, "history": len(self.decays) * scores}
        sizes |= dict.fromkeys(("token", "past", "previous"), self.width)
        ends = itertools.accumulate(sizes.values())
        return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    @property
    def _rows(self) -> int:
        """Layers in the counts: past the last one rows of zeros, so that every source reads H of them."""
        return self.layers + self.distances - 1


class CommonLeaves(NamedTuple):
    """What all sources share: embeddings of tokens `[V, r]` and of the experts of each layer `[L, E, r]`."""

    tokens: Float[Array, "V r"]
    experts: Float[Array, "L E r"]


class SourceLeaves(NamedTuple):
    """One source's network; I is the length of its input, `CorrectionSpec.columns`."""

    enter: Float[Array, "r I"]
    enter_bias: Float[Array, " r"]
    leave: Float[Array, "HE r"]
    leave_bias: Float[Array, "H E"]
    scale: Float[Array, " H"]
    history_scale: Float[Array, "n H"]


class _State(NamedTuple):
    """A state's parts: the layer that comes next, embeddings of token, its experts, the token before's, and counts."""

    layer: Float32[Array, "B 1"]
    token: Float32[Array, "B r"]
    past: Float32[Array, "B r"]
    previous: Float32[Array, "B r"]
    counts: Float32[Array, "B n R E"]


class Correction(nnx.Module):
    """Embeddings and the networks of all sources, float32, stacked along the sources.

    A fresh one changes nothing of the order that the pre-gate scores give.
    """

    def __init__(self, spec: CorrectionSpec, *, rngs: nnx.Rngs):
        count, width, float32 = spec.layers, spec.width, jnp.dtype(jnp.float32)
        outputs, distances = spec.distances * spec.experts, spec.distances
        inputs = spec.columns["previous"].stop
        base = math.log((spec.top_k + 0.5) / (spec.experts - spec.top_k + 0.5))
        self.spec = spec
        self.tokens = normal_param((spec.vocab, width), float32, rngs)
        self.experts = normal_param((spec.layers, spec.experts, width), float32, rngs)
        self.enter = normal_param((count, width, inputs), float32, rngs)
        self.enter_bias = nnx.Param(jnp.zeros((count, width)))
        self.leave = nnx.Param(jnp.zeros((count, outputs, width)))
        self.leave_bias = nnx.Param(jnp.full((count, distances, spec.experts), base, float32))
        self.scale = nnx.Param(jnp.ones((count, distances)))
        self.history_scale = nnx.Param(jnp.zeros((count, len(spec.decays), distances)))

    @property
    def common(self) -> CommonLeaves:
        """What `begin` and `advance` take."""
        return CommonLeaves(self.tokens[...], self.experts[...])

    @property
    def sources(self) -> SourceLeaves:
        """The leaves of all sources, each with a leading axis of L; `correct` takes those of one."""
        return SourceLeaves(*(getattr(self, name)[...] for name in SourceLeaves._fields))


def begin(
    spec: CorrectionSpec, common: CommonLeaves, tokens: Int32[Array, " B"], state: Float32[Array, "B W"]
) -> Float32[Array, "B W"]:
    """The state at the start of a step, before layer 0.

    Args:
      spec: the correction's.
      common: shared leaves.
      tokens: the tokens that the step takes in.
      state: what the step before left; zeros at a sequence's start.
    """
    old = _split(spec, state)
    token = common.tokens[tokens].astype(jnp.float32)
    return _join(_State(jnp.zeros_like(old.layer), token, jnp.zeros_like(old.past), old.past, old.counts))


def advance(
    spec: CorrectionSpec,
    common: CommonLeaves,
    state: Float32[Array, "B W"],
    layer: Int32[Array, ""],
    ids: Int32[Array, "B K"],
) -> Float32[Array, "B W"]:
    """The state after the router of MoE layer `layer` chose `ids`; a sequence whose ids are -1 keeps its own."""
    old = _split(spec, state)
    active = ids[:, :1] >= 0
    chosen = jax.nn.one_hot(ids, spec.experts).sum(axis=1)
    embedded = common.experts[layer][jnp.maximum(ids, 0)].astype(jnp.float32).sum(axis=1)
    decays = jnp.array(spec.decays)[None, :, None]
    row = jax.lax.dynamic_index_in_dim(old.counts, layer, axis=2, keepdims=False)
    row = jnp.where(active[:, None], decays * row + (1 - decays) * chosen[:, None], row)
    return _join(
        old._replace(
            layer=jnp.full_like(old.layer, layer + 1),
            past=old.past + jnp.where(active, embedded, 0),
            counts=jax.lax.dynamic_update_index_in_dim(old.counts, row, layer, axis=2),
        )
    )


def absorb(
    spec: CorrectionSpec,
    common: CommonLeaves,
    state: Float32[Array, "B W"],
    layer: Int32[Array, ""],
    ids: Int32[Array, "B T K"],
) -> Float32[Array, "B W"]:
    """The state after the router of MoE layer `layer` chose `ids` for a chunk of the sequences' prompts.

    What `begin` and `advance` would leave, had the tokens run one by one and every layer been absorbed in its turn.
    Columns of -1 are padding.
    """
    old = _split(spec, state)
    active = ids[:, :, 0] >= 0
    after = jnp.cumsum(active[:, ::-1], axis=1)[:, ::-1] - active  # tokens of the chunk that follow
    chosen = jax.nn.one_hot(ids, spec.experts).sum(axis=2)
    decays = jnp.array(spec.decays)[None, :, None]
    weights = jnp.where(active[:, None], (1 - decays) * decays ** after[:, None], 0)
    row = jax.lax.dynamic_index_in_dim(old.counts, layer, axis=2, keepdims=False)
    count = active.sum(axis=1)[:, None, None]
    row = decays**count * row + jnp.einsum("bnt,bte->bne", weights, chosen, precision=jax.lax.Precision.HIGHEST)
    last = jnp.take_along_axis(ids, jnp.maximum(active.sum(axis=1) - 1, 0)[:, None, None], axis=1)[:, 0]
    embedded = common.experts[layer][jnp.maximum(last, 0)].astype(jnp.float32).sum(axis=1)
    past = jnp.where(layer > 0, old.past, 0) + embedded
    return _join(
        old._replace(
            layer=jnp.full_like(old.layer, layer + 1),
            past=jnp.where(active.any(axis=1)[:, None], past, old.past),
            counts=jax.lax.dynamic_update_index_in_dim(old.counts, row, layer, axis=2),
        )
    )


def correct(
    spec: CorrectionSpec, leaves: SourceLeaves, choice: Float32[Array, "B H E"], state: Float32[Array, "B W"]
) -> Float32[Array, "B H E"]:
    """Log-odds that each sequence uses each expert, by distance.

    Args:
      spec: the correction's.
      leaves: those of the source, in float32 or a 16-bit type; sums are float32.
      choice: pre-gate choice scores by distance. What is masked may be infinite; NaN makes NaN.
      state: of the sequences, after `advance` of the layer before, or after `begin`.
    """
    parts = _split(spec, state)
    scores = standardise(choice)
    first = parts.layer[0, 0].astype(jnp.int32)
    history = jax.lax.dynamic_slice_in_dim(parts.counts, first, spec.distances, axis=2)
    inputs = [scores, history, parts.token, parts.past, parts.previous]
    flat = jnp.concatenate([part.reshape(len(choice), -1) for part in inputs], axis=1)
    return network(leaves, flat, scores, history)


def network(
    leaves: SourceLeaves,
    flat: Float32[Array, "B I"],
    scores: Float32[Array, "B H E"],
    history: Float32[Array, "B n H E"],
) -> Float32[Array, "B H E"]:
    """One source's log-odds from its inputs, `flat` in the order of `CorrectionSpec.columns`."""
    dtype = leaves.enter.dtype
    hidden = matmul_f32(flat.astype(dtype), leaves.enter) + along_last(leaves.enter_bias.astype(jnp.float32), flat)
    change = matmul_f32(jax.nn.silu(hidden).astype(dtype), leaves.leave).reshape(scores.shape)
    scale, history_scale = (leaf.astype(jnp.float32) for leaf in (leaves.scale, leaves.history_scale))
    own = scores * scale[None, :, None] + (history * history_scale[None, :, :, None]).sum(axis=1)
    return own + change + leaves.leave_bias.astype(jnp.float32)[None]


def standardise(choice: Float32[Array, "*rows E"]) -> Float32[Array, "*rows E"]:
    """Choice scores with mean 0 and deviation 1 over the experts; infinite ones stand apart and do not count."""
    finite = ~jnp.isinf(choice)
    mean = jnp.mean(choice, axis=-1, keepdims=True, where=finite)
    std = jnp.std(choice, axis=-1, keepdims=True, where=finite)
    return jnp.clip((choice - mean) / jnp.maximum(std, _LEAST_STD), -_LIMIT, _LIMIT)


def leaf_shapes(spec: CorrectionSpec) -> tuple[CommonLeaves, SourceLeaves]:
    """Shapes and dtypes of the leaves, those of one source; nothing is allocated."""

    def build() -> tuple[CommonLeaves, SourceLeaves]:
        module = Correction(spec, rngs=nnx.Rngs(0))
        return module.common, jax.tree.map(lambda leaf: leaf[0], module.sources)

    return jax.eval_shape(build)


def _split(spec: CorrectionSpec, state: Float32[Array, "B W"]) -> _State:
    ends = (1, 1 + spec.width, 1 + 2 * spec.width, 1 + 3 * spec.width)
    layer, token, past, previous, counts = jnp.split(state, ends, axis=1)
    shape = (len(state), len(spec.decays), spec.layers + spec.distances - 1, spec.experts)
    return _State(layer, token, past, previous, counts.reshape(shape))


def _join(parts: _State) -> Float32[Array, "B W"]:
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
