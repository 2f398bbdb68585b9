"""How the residual stream moves from layer to layer on average, and what that adds to pre-gate scores.

Pre-gating takes the residual stream of now for that of a later layer. The mean of what the layers between add is known
once it has been measured. It is measured on streams that are normed, as routers read them, because their lengths grow
from layer to layer; there a shift of the stream is a shift of the router's logits, one number an expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from ef_jax.errors import InputError
from ef_jax.nn import RouterStack, merge_top, top_definition
from ef_jax.nn.linear import along_last, matmul_f32
from ef_jax.nn.norm import gain, unit
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.recorder import Serve, routed_of
from ef_jax.spec import ModelSpec


class ResidualMeans:
    """Listens to the passes of an engine and adds up residual streams, each normed as the model does before weights.

    Sources are those of `pregate`: 0 the embeddings, l + 1 what the router of MoE layer l reads. The first token of a
    sequence does not count: models park attention on it, and its residual stream is unlike all others (Sun et al. 2024,
    arXiv 2402.17762).

    Args:
      spec: the model.
      dense: its weights on the device.
    """

    def __init__(self, spec: ModelSpec, dense: DenseWeights) -> None:
        self._definition, self._top, self._spec = top_definition(spec)[0], dense.top, spec
        self._sums = [np.zeros(spec.hidden, np.float32)] * (len(spec.moe_layers) + 1)
        self._embed = jax.jit(lambda top, tokens: merge_top(self._definition, top).embed_tokens(tokens))
        self._tokens = 0

    def listen(self, serve: Serve, tokens: jax.Array | np.ndarray, positions: np.ndarray, numbers: np.ndarray) -> Serve:
        """A pass begins; as `Recorder.listen`."""
        counted = positions > 0
        self._tokens += int(counted.sum())
        self._add(0, self._embed(self._top, tokens), counted)

        def listening(layer: int, carried: Any) -> Any:
            self._add(layer + 1, routed_of(carried).x, counted)
            return serve(layer, carried)

        return listening

    def means(self) -> Float32[np.ndarray, "sources D"]:
        """The mean normed residual stream of each source.

        Raises:
          InputError: nothing has run but first tokens.
        """
        if not self._tokens:
            raise InputError("no residual streams were seen: give texts of two tokens at least")
        return np.stack([np.asarray(total) for total in self._sums]) / np.float32(self._tokens)

    def _add(self, source: int, x: jax.Array, counted: np.ndarray) -> None:
        self._sums[source] = _add_normed(self._spec, self._sums[source], x, counted)


def logit_shifts(
    spec: ModelSpec, stack: RouterStack, means: Float32[np.ndarray, "sources D"], distances: int
) -> Float32[np.ndarray, "sources H E"]:
    """What `pregate` is to add to logits: at `[s, d - 1]`, for the router of MoE layer s - 1 + d on source s.

    Args:
      spec: the model.
      stack: its routers.
      means: of a `ResidualMeans`, L + 1 sources.
      distances: H.

    Returns:
      The router's logits of the mean way from source s to source s + d, which is what that router reads. Zeros for
      layers past the last.
    """
    layers = len(spec.moe_layers)
    shifts = np.zeros((layers + 1, distances, spec.experts.count), np.float32)
    for target in range(layers):
        first = max(0, target + 1 - distances)
        ways = jnp.asarray(means[target + 1] - means[first : target + 1])
        ways = ways * along_last(gain(stack.norms[target], spec.norm), ways)
        logits = np.asarray(matmul_f32(ways, stack.routers[target].astype(jnp.float32)))
        for source, row in enumerate(logits, first):
            shifts[source, target - source] = row
    return shifts


@functools.partial(jax.jit, static_argnums=0)
def _add_normed(
    spec: ModelSpec, total: Float32[Array, " D"], x: Float[Array, "B T D"], counted: Bool[Array, "B T"]
) -> Float32[Array, " D"]:
    normed = unit(x, spec.norm, spec.norm_eps)
    return total + jnp.sum(jnp.where(counted[..., None], normed, 0), axis=(0, 1))
