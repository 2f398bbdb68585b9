"""Pre-gate scores of every pass, for recordings: programs of their own beside those that serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int32

from ef_jax.errors import InputError
from ef_jax.nn import RouterStack, merge_top, pregate, stack_routers, top_definition
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.steps import Leaves
from ef_jax.spec import ModelSpec

_LARGEST = float(np.finfo(np.float16).max)


class PregateProbe:
    """Scores residual streams by the routers of the layers to come.

    It takes device memory beyond the plan: the routers once more, and the scores until they are read.

    Args:
      spec: the model.
      dense: its weights on the device.
      distances: H, layers ahead.

    Raises:
      InputError: as `check_distances`.
    """

    def __init__(self, spec: ModelSpec, dense: DenseWeights, distances: int) -> None:
        check_distances(spec, distances)
        self.distances = distances
        self._spec, self._top = spec, dense.top
        self._stack = jax.jit(stack_routers, static_argnums=(0, 2))(spec, dense.layers, distances)

    def embedded(self, tokens: Int32[Array | np.ndarray, "B T"]) -> Float16[Array, "B T H E"]:
        """Scores of source 0, the embeddings of tokens: by MoE layers 0 to H - 1."""
        return _embedded(self._spec, self._stack, self._top, tokens, self.distances)

    def residual(self, source: int, x: Float[Array, "B T D"]) -> Float16[Array, "B T H E"]:
        """Scores of a residual stream that has passed `source` routers: by MoE layers `source` to `source + H - 1`."""
        return _scores(self._spec, self._stack, x, np.int32(source), self.distances)


def check_distances(spec: ModelSpec, distances: int) -> None:
    """Refuse distances that no source of the model has.

    Raises:
      InputError: `distances` is not in 1 to L.
    """
    layers = len(spec.step_moe_layers)
    if not 1 <= distances <= layers:
        raise InputError(f"pre-gate scores {distances} layers ahead: give 1 to {layers}, the model's MoE layers")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _scores(
    spec: ModelSpec, stack: RouterStack, x: Float[Array, "B T D"], source: Int32[Array, ""], distances: int
) -> Float16[Array, "B T H E"]:
    scores = pregate(spec, stack, x, source, distances)
    return jnp.where(jnp.isinf(scores), scores, jnp.clip(scores, -_LARGEST, _LARGEST)).astype(jnp.float16)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _embedded(
    spec: ModelSpec, stack: RouterStack, top: Leaves, tokens: Int32[Array, "B T"], distances: int
) -> Float16[Array, "B T H E"]:
    x = merge_top(top_definition(spec)[0], top).embed_tokens(tokens)
    return _scores(spec, stack, x, jnp.int32(0), distances)
