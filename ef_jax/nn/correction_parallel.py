"""A correction's log-odds for many tokens and all sources at once: for training, and for recorded routing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.nn.correction import CommonLeaves, CorrectionSpec, SourceLeaves, network, standardise


class TokenInputs(NamedTuple):
    """What is known of M tokens, of any sequences.

    Attributes:
      tokens: their ids.
      experts: what each layer chose for them.
      before: what each layer chose for the token before; -1 for a sequence's first.
      counts: the decayed counts before them, `CorrectionSpec.decays`.
      choice: pre-gate choice scores by source and distance.
    """

    tokens: Int32[Array, " M"]
    experts: Int32[Array, "M L K"]
    before: Int32[Array, "M L K"]
    counts: Float[Array, "M n L E"]
    choice: Float[Array, "M L H E"]


def correct_tokens(
    spec: CorrectionSpec, common: CommonLeaves, sources: SourceLeaves, inputs: TokenInputs
) -> Float32[Array, "M L H E"]:
    """What `correct` gives in a run token by token.

    Args:
      spec: the correction's.
      common: shared leaves.
      sources: the leaves of all sources, stacked.
      inputs: the tokens.
    """
    scores = standardise(inputs.choice.astype(jnp.float32)).swapaxes(0, 1)
    history = _windows(inputs.counts.astype(jnp.float32), spec.distances)
    ends = jnp.cumsum(_embedded(common, inputs.experts), axis=0)
    past = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    token = jnp.broadcast_to(common.tokens[inputs.tokens].astype(jnp.float32)[None], past.shape)
    previous = jnp.broadcast_to(_embedded(common, inputs.before).sum(axis=0)[None], past.shape)

    def one(
        leaves: SourceLeaves, scores: Array, history: Array, token: Array, past: Array, previous: Array
    ) -> Float32[Array, "M H E"]:
        parts = [part.reshape(len(part), -1) for part in (scores, history, token, past, previous)]
        return network(leaves, jnp.concatenate(parts, axis=1), scores, history)

    return jax.vmap(one)(sources, scores, history, token, past, previous).swapaxes(0, 1)


def targets(experts: Int32[Array, "M L K"], num_experts: int, distances: int) -> Float32[Array, "M L H E"]:
    """Ones for the experts that a token used, by source and distance; zeros past the last layer."""
    used = jax.nn.one_hot(experts, num_experts).sum(axis=2)[:, None]
    return _windows(used, distances)[:, :, 0].swapaxes(0, 1)


def _windows(rows: Float32[Array, "M n L E"], distances: int) -> Float32[Array, "L M n H E"]:
    """The layers at which each source aims; zeros past the last."""
    layers = rows.shape[2]
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, distances - 1), (0, 0)))
    return jnp.stack([padded[:, :, source : source + distances] for source in range(layers)])


def _embedded(common: CommonLeaves, experts: Int32[Array, "M L K"]) -> Float32[Array, "L M r"]:
    """The sum of the embeddings of each layer's experts; zeros for -1."""

    def one(table: Float[Array, "E r"], ids: Int32[Array, "M K"]) -> Float32[Array, "M r"]:
        total = table[jnp.maximum(ids, 0)].astype(jnp.float32).sum(axis=1)
        return jnp.where(ids[:, :1] >= 0, total, 0)

    return jax.vmap(one)(common.experts, experts.swapaxes(0, 1))
