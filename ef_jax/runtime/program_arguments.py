"""The shapes, dtypes and places of what an engine's programs take: what they are compiled for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.memory.slot_pool import pool_shapes
from ef_jax.nn import cache_shapes, dense_shapes, finish_paths, leaf_names, top_definition
from ef_jax.runtime import pass_shapes, steps
from ef_jax.runtime.look_ahead import LookAheadSpec, look_shapes, state_shape
from ef_jax.spec import LayerSpec, ModelSpec


class ProgramArguments:
    """Abstract arguments of the programs of one engine; see `Programs` for the sizes."""

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        rows: int,
        context: int,
        pool_slots: int,
        look_ahead: LookAheadSpec | None,
        sharding: jax.sharding.Sharding,
    ) -> None:
        self.spec, self.batch, self.rows, self.context = spec, batch, rows, context
        self.pool_slots, self.look_ahead = pool_slots, look_ahead
        self._sharding = sharding
        self._kinds = [layer.kind for layer in spec.layers]
        self._moe_kind = self._kinds[spec.moe_layers[0]]

    def pass_kinds(self, width: int) -> list[LayerSpec]:
        """Kinds of the layers that a pass of that width runs: a decode step, or prompts."""
        return [self._kinds[index] for index in (self.spec.step_layers if width == 1 else self.spec.prompt_layers)]

    def lanes(self, width: int) -> int:
        """Sequences of a pass of that width."""
        return pass_shapes.lanes(width, self.batch)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)

    def _float(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, jnp.dtype(self.spec.dtype))

    def _device_int(self, *shape: int) -> jax.ShapeDtypeStruct:
        return self._array(shape, np.int32)

    def _int(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    def _dense(self, name: str) -> jax.ShapeDtypeStruct:
        shape = dense_shapes(self.spec)[name]
        return self._array(shape.shape, shape.dtype)

    def _leaves(self, kind: LayerSpec) -> list[jax.ShapeDtypeStruct]:
        return [self._dense(name) for name in leaf_names(self.spec, self._kinds.index(kind))]

    def _finish(self, kind: LayerSpec) -> list[jax.ShapeDtypeStruct]:
        index = self._kinds.index(kind)
        return [
            self._dense(f"layers.{index}.{path}") for path in (finish_paths(self.spec) if kind.ffn == "moe" else ())
        ]

    def _top_leaves(self) -> list[jax.ShapeDtypeStruct]:
        return [self._dense(path) for path in top_definition(self.spec)[1]]

    def _pool(self) -> Any:
        return pool_shapes(self.spec.block_format, self.pool_slots, self._sharding)

    def _layer_inputs(self, kind: LayerSpec) -> tuple[Any, ...]:
        shapes = cache_shapes(self.spec, kind, self.rows, self.context)
        return tuple(self._array(shape.shape, shape.dtype) for shape in shapes), self._device_int(2)

    def _routed(self, width: int) -> Any:
        lanes = self.lanes(width)
        hidden = self._float(lanes, width, self.spec.hidden)
        chosen = (lanes, width, self.spec.experts.top_k)
        weights = jnp.dtype(self.spec.dtype if self.spec.router.casts_back else np.float32)
        return steps.Routed._make((hidden, hidden, self._array(chosen, np.int32), self._array(chosen, weights)))

    def _sorted(self, width: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        rows = self.lanes(width) * width * self.spec.experts.top_k
        flat = self._float(rows, self.spec.hidden)
        sizes = self._device_int(self.spec.experts.count)
        return steps.SortedRows._make((flat, self._device_int(rows), sizes)), flat

    def _carried(self, width: int, kind: LayerSpec) -> Any:
        if kind.ffn == "dense":
            return self._float(self.lanes(width), width, self.spec.hidden)
        if width == 1:
            outputs = self._float(self.batch * self.spec.experts.top_k, self.spec.hidden)
            return self._routed(1), self._pool(), self._int(self.spec.experts.count), outputs
        rows, outputs = self._sorted(width)
        return self._routed(width), rows.order, outputs

    def _look(self, width: int, kind: LayerSpec | None = None) -> tuple[Any, Any]:
        """Arguments "look" and "state" of a program that ends in a layer of this kind; None: that looks always."""
        if self.look_ahead is None or width > 1 or (kind is not None and kind.ffn == "dense"):
            return None, None
        state = None
        if self.look_ahead.correction is not None:
            shape = state_shape(self.look_ahead.correction, self.rows)
            state = self._array(shape.shape, shape.dtype)
        return look_shapes(self.spec, self.look_ahead, self._sharding), state

    def _seen(self) -> jax.ShapeDtypeStruct:
        return self._array((self.rows, self.spec.vocab), np.bool_)
