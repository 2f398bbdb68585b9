"""The sequences of an engine on a mesh: which device has which, and their parts of what passes take in."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Int64

from ef_jax.mesh.layout import MeshLayout
from ef_jax.nn import cache_shapes
from ef_jax.runtime.rows import Chunk, Rows
from ef_jax.spec import LayerSpec, ModelSpec


class MeshRows(Rows):
    """R rows, as many on each part of the devices, in order: a row's part is the row over R / parts.

    A step runs all rows, each in the place of its row. In what passes take in, rows and places are numbers on their own
    device. `spec` is the model as a device has it.
    """

    def __init__(self, spec: ModelSpec, layout: MeshLayout, *, rows: int, context: int) -> None:
        self._layout = layout
        self.here = rows // layout.row_shards
        super().__init__(spec, rows=rows, batch=rows, context=context, sharding=layout.rows)

    def _empty(self, layer: LayerSpec) -> tuple[jax.Array, ...]:
        shapes = cache_shapes(self._spec, layer.kind, self.here * self._layout.count, self._context)
        return tuple(jnp.zeros(shape.shape, shape.dtype, device=self._layout.each) for shape in shapes)

    def put(self, tree: Any) -> Any:
        """See `Rows`."""
        return self._layout.put(tree, self._layout.rows)

    def part(self, row: int) -> int:
        """Which part of the devices has a row."""
        return row // self.here

    def turns(self, parts: Sequence[tuple[int, int]], lanes: int) -> list[list[tuple[int, int]]]:
        """Chunks `(row, start)` in as few passes as have, with so many lanes in all, a lane for each of a device's."""
        each = lanes // self._layout.row_shards
        turns: list[list[tuple[int, int]]] = []
        count = [0] * self._layout.row_shards
        for row, start in parts:
            turn, count[self.part(row)] = count[self.part(row)] // each, count[self.part(row)] + 1
            turns += [[] for _ in range(turn + 1 - len(turns))]
            turns[turn].append((row, start))
        return turns

    def lane(self, row: int, lanes: int) -> int:
        """The first lane of the device that has a row."""
        return self.part(row) * (lanes // self._layout.row_shards)

    def numbers(self, index: Int32[np.ndarray, "B"] | None) -> Int64[np.ndarray, "B"]:
        """See `Rows`."""
        return super().numbers(None if index is None else np.minimum(index, self.here - 1) + self._first(len(index)))

    def chunk(self, width: int, lanes: int, parts: Sequence[tuple[int, int]], ends: Mapping[int, int]) -> Chunk:
        """See `Rows`; no device has more of `parts` than its share of the lanes."""
        pieces = []
        for part in range(self._layout.row_shards):
            own = [(row, start) for row, start in parts if self.part(row) == part]
            pieces.append(super().chunk(width, lanes // self._layout.row_shards, own, ends))
        first = self._first(lanes)
        chunk = Chunk(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
        nobody = chunk.rows == self.count
        chunk.rows[:] = np.where(nobody, self.here, chunk.rows - first)
        none = chunk.ends[:, 1] == self.batch
        chunk.ends[:, 1] = np.where(none, self.here, chunk.ends[:, 1] - first)
        return chunk

    def _first(self, lanes: int) -> Int32[np.ndarray, "lanes"]:
        """The first row of the device that has each of so many lanes."""
        shards = self._layout.row_shards
        return np.repeat(np.arange(shards, dtype=np.int32) * self.here, lanes // shards)
