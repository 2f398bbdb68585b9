"""The sequences that an engine holds: what their layers remember, lengths, sampling."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Int64

from ef_jax.nn import cache_shapes
from ef_jax.runtime.sampling import SamplingArrays, sampling_arrays
from ef_jax.sampling_options import SamplingOptions
from ef_jax.spec import LayerSpec, ModelSpec

_NOBODY = (SamplingOptions(), 0)
_MOST_GROUPS = 64


class Chunk(NamedTuple):
    """One chunk of each of some prompts, as a pass takes it.

    Attributes:
      tokens, positions: int32 `[lanes, T]`; 0 and -1 where there is no token.
      rows: int32 `[lanes]`; R in lanes that are empty.
      ends: int32 `[lanes, 2]`, see `Programs.end_chunk`.
    """

    tokens: Int32[np.ndarray, "lanes T"]
    positions: Int32[np.ndarray, "lanes T"]
    rows: Int32[np.ndarray, "lanes"]
    ends: Int32[np.ndarray, "lanes two"]


class Rows:
    """R rows of the layers' caches and what else belongs to the sequence in each.

    Args:
      spec: the model.
      rows: R.
      batch: B, sequences of a step.
      context: tokens a sequence.
      sharding: where the arrays are.

    Attributes:
      caches: what each decoder layer's mixer remembers, device arrays (`cache_shapes`); programs donate and
        replace them.
      seen: bool `[R, V]` on the device, tokens of prompt and text so far.
      prompts: each row's prompt.
      number: int64 `[R]`, of the sequence in each row: they are counted as they join.
      length: int32 `[R]`, tokens in the caches.
      step: int32 `[R]`, tokens generated.
      tokens: int32 `[R]`, the last of them, which no layer has run on yet.
    """

    def __init__(
        self, spec: ModelSpec, *, rows: int, batch: int, context: int, sharding: jax.sharding.Sharding
    ) -> None:
        self.sharding = sharding
        self.count, self.batch = rows, batch
        self._spec, self._context = spec, context
        self.prompts: list[np.ndarray] = [np.zeros(0, np.int32)] * rows
        self.number, self._joined = np.zeros(rows, np.int64), 0
        self.length, self.step, self.tokens = (np.zeros(rows, np.int32) for _ in range(3))
        self._options = [_NOBODY] * rows
        self._sampling: dict[tuple[int, ...], SamplingArrays] = {}
        self.clear()

    def clear(self) -> None:
        """New arrays on the device: what was in them is gone."""
        self.caches = [self._empty(layer) for layer in self._spec.layers]
        self.seen = jnp.zeros((self.count, self._spec.vocab), bool, device=self.sharding)

    def _empty(self, layer: LayerSpec) -> tuple[jax.Array, ...]:
        shapes = cache_shapes(self._spec, layer.kind, self.count, self._context)
        return tuple(jnp.zeros(shape.shape, shape.dtype, device=self.sharding) for shape in shapes)

    @property
    def lost(self) -> bool:
        """A program that failed has taken arrays with it."""
        return any(array.is_deleted() for array in (*jax.tree.leaves(self.caches), self.seen))

    def put(self, tree: Any) -> Any:
        """Host arrays of a step's sequences on the device."""
        return jax.device_put(tree, self.sharding)

    def join(self, row: int, prompt: Int32[np.ndarray, "T"], options: SamplingOptions, draw: int) -> None:
        """A new sequence takes a row; what the caches hold of the last one is overwritten as it runs."""
        self.prompts[row] = prompt
        self.number[row], self._joined = self._joined, self._joined + 1
        self.length[row] = self.step[row] = 0
        self._options[row] = options, draw
        self._sampling.clear()

    def places(self, rows: list[int]) -> list[int]:
        """Where the sequences of `rows` stand in a step: each in the place of its row, where there is one for each."""
        return rows if self.count == self.batch else list(range(len(rows)))

    def index(self, rows: list[int]) -> Int32[np.ndarray, "B"]:
        """The row in each place of a step; R in those that are empty."""
        index = np.full(self.batch, self.count, np.int32)
        index[self.places(rows)] = rows
        return index

    def numbers(self, index: Int32[np.ndarray, "B"] | None) -> Int64[np.ndarray, "B"]:
        """The number of the sequence in each place of a pass that runs the rows of `index`, None: all, in order; of
        places that are empty, anything."""
        return self.number[np.arange(self.count) if index is None else np.minimum(index, self.count - 1)]

    def sampling(self, rows: list[int]) -> SamplingArrays:
        """The sampling options of a step, on the device."""
        key = () if self.count == self.batch else tuple(rows)
        if key not in self._sampling:
            if len(self._sampling) == _MOST_GROUPS:
                self._sampling.clear()
            of_place = [_NOBODY] * self.batch if key else list(self._options)
            for place, row in zip(self.places(rows), rows, strict=True):
                of_place[place] = self._options[row]
            self._sampling[key] = self.put(sampling_arrays(of_place))
        return self._sampling[key]

    def chunk(self, width: int, lanes: int, parts: Sequence[tuple[int, int]], ends: Mapping[int, int]) -> Chunk:
        """A pass over the prompts of some rows.

        Args:
          width: tokens of each prompt.
          lanes: prompts that the pass has room for.
          parts: row and start of each.
          ends: of the rows whose prompts end in the pass, where their last residual row goes.
        """
        tokens, positions = np.zeros((lanes, width), np.int32), np.full((lanes, width), -1, np.int32)
        index = np.full(lanes, self.count, np.int32)
        last = np.array([[0, self.batch]] * lanes, np.int32)
        for lane, (row, start) in enumerate(parts):
            part = self.prompts[row][start : start + width]
            tokens[lane, : len(part)] = part
            positions[lane, : len(part)] = np.arange(start, start + len(part))
            index[lane] = row
            if row in ends:
                last[lane] = len(part) - 1, ends[row]
        return Chunk(tokens, positions, index, last)


def take(array, rows):  # type: ignore[no-untyped-def]
    """Some rows of an array, while tracing; all of them where `rows` is None."""
    return array if array is None or rows is None else array.at[rows].get(mode="clip")


def put(array, rows, new):  # type: ignore[no-untyped-def]
    """The array with new rows, those beyond its end left out, while tracing; `new` itself where `rows` is None."""
    return new if new is None or rows is None else array.at[rows].set(new, mode="drop")
