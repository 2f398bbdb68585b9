"""The routing-path predictor at work: what the rows of an engine use next, known as soon as their tokens are."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, UInt8

from ef_jax.nn.routing_path import PathState, RoutingPath, RoutingPathSpec, decode, empty_state, join
from ef_jax.predict.log_odds import to_bins

_LEAST_WIDTH = 16


class _Programs(NamedTuple):
    """Compiled ahead of time: joining by width of the prompt, and following one token of `batch` rows."""

    join: dict[int, jax.stages.Compiled]
    follow: jax.stages.Compiled


class RoutingPaths:
    """Predicted paths of R rows. Calls are dispatched and not waited for, but for `bins`; nothing compiles in them.

    Args:
      path: a trained predictor.
      rows: R, sequences held at once.
      batch: B, rows that take a token together.
      context: generated tokens to follow. Rows may take more: the predictor sees its window, or the last `context`
        tokens if they are fewer.
      sharding: where its arrays live.
    """

    def __init__(
        self, path: RoutingPath, *, rows: int, batch: int, context: int, sharding: jax.sharding.Sharding
    ) -> None:
        self._spec, self._rows, self._context, self._sharding = path.spec, rows, context, sharding
        self._leaves = jax.device_put(nnx.split(path)[1], sharding)
        self._programs = _compile(path.spec, rows, batch, context, sharding)
        self.reset()

    def reset(self) -> None:
        """Forget all rows, also after an error that left their state unusable."""
        self._state: PathState = jax.device_put(
            empty_state(self._spec, rows=self._rows, context=self._context), self._sharding
        )
        self._latest: dict[int, tuple[UInt8[Array, "B L E"], int]] = {}  # by row, and its place in the batch

    def join(self, row: int, prompt: Int32[np.ndarray, "T"]) -> None:
        """A new sequence takes a row; the last `most_prompt` tokens of its prompt are read."""
        told = prompt[-self._spec.most_prompt :]
        width = next(width for width in self._programs.join if width >= len(told))
        padded = np.zeros(width, np.int32)
        padded[: len(told)] = told
        program = self._programs.join[width]
        self._state = program(self._leaves, self._state, np.int32(row), padded, np.int32(len(told)))
        self._latest.pop(row, None)

    def follow(self, rows: Int32[np.ndarray, "B"], tokens: Int32[Array | np.ndarray, "B 1"]) -> None:
        """These rows have just taken these tokens.

        Args:
          rows: distinct; R and above are padding.
          tokens: may still be under way on the device.
        """
        bins, self._state = self._programs.follow(self._leaves, self._state, rows, tokens)
        bins.copy_to_host_async()
        for place, row in enumerate(rows.tolist()):
            if row < self._rows:
                self._latest[row] = bins, place

    def bins(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n L E"]:
        """Bins of what the latest token of each row uses; zeros for a row that has followed none yet. Waits."""
        out = np.zeros((len(rows), self._spec.layers, self._spec.experts), np.uint8)
        for place, row in enumerate(rows):
            if row in self._latest:
                bins, at = self._latest[row]
                out[place] = np.asarray(bins)[at]
        return out


def routing_path_bytes(spec: RoutingPathSpec, *, rows: int, context: int) -> int:
    """Device bytes of a predictor, what it remembers of `rows` rows, and their bins; from shapes alone."""
    state = jax.eval_shape(lambda: empty_state(spec, rows=rows, context=context))
    arrays = [*jax.tree.leaves(_abstract(spec)[1]), *state]
    return sum(array.size * array.dtype.itemsize for array in arrays) + rows * spec.layers * spec.experts


@functools.cache
def _abstract(spec: RoutingPathSpec) -> tuple[Any, Any]:
    """Structure, and shapes of the leaves."""
    return nnx.split(nnx.eval_shape(lambda: RoutingPath(spec, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=8)  # loading a model again compiles nothing
def _compile(spec: RoutingPathSpec, rows: int, batch: int, context: int, sharding: jax.sharding.Sharding) -> _Programs:
    graph, leaves = _abstract(spec)

    def joined(leaves: Any, state: PathState, row: Array, prompt: Array, length: Array) -> PathState:
        return join(nnx.merge(graph, leaves), state, row, prompt, length)

    def followed(leaves: Any, state: PathState, rows: Array, tokens: Array) -> tuple[UInt8[Array, "B L E"], PathState]:
        odds, state = decode(nnx.merge(graph, leaves), state, rows, tokens[:, 0])
        return to_bins(odds, jnp), state

    def compiled(function: Any, *shapes: tuple[int, ...]) -> jax.stages.Compiled:
        state = jax.eval_shape(lambda: empty_state(spec, rows=rows, context=context))
        arguments = (leaves, state, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        return jax.jit(function, donate_argnums=1, out_shardings=sharding).lower(*placed).compile()

    widths = [spec.most_prompt]
    while widths[0] > _LEAST_WIDTH:
        widths.insert(0, max(_LEAST_WIDTH, widths[0] // 2))
    return _Programs(
        {width: compiled(joined, (), (width,), ()) for width in widths}, compiled(followed, (batch,), (batch, 1))
    )
