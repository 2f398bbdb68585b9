"""What a pass reads and multiplies, layer by layer, from a model's spec."""

import dataclasses
import functools
import math

from ef_jax.forecast.hit_rate import distinct_experts
from ef_jax.nn import cache_shapes, dense_shapes, leaf_names
from ef_jax.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """One layer of a pass.

    Attributes:
      read_bytes: of weights (experts in use among them) and caches, from device memory.
      operations: of products with weights, two a weight and token.
      expert_operations: of these, those with expert weights.
      experts: distinct ones in use; 0 in a dense layer.
    """

    read_bytes: float
    operations: float
    expert_operations: float
    experts: float


def step_work(spec: ModelSpec, *, batch: int, positions: int) -> list[LayerWork]:
    """The layers of a step of `batch` sequences that each have `positions` tokens behind them, and one more for the
    output head.

    A layer reads its own weights, the blocks of the experts in use (`distinct_experts`), and of each sequence what it
    remembers of its positions; a sliding window is read whole like any cache. Products of attention with its caches
    are left out: they are bound by the reading.
    """
    layers = [_layer(spec, index, sequences=batch, tokens=batch, positions=positions) for index in spec.step_layers]
    return [*layers, _head(spec, batch)]


def prompt_work(spec: ModelSpec, *, tokens: int, positions: int) -> list[LayerWork]:
    """The layers of a pass of `tokens` prompt tokens of one sequence that has `positions` behind it, and the head."""
    layers = [_layer(spec, index, sequences=1, tokens=tokens, positions=positions) for index in spec.prompt_layers]
    return [*layers, _head(spec, 1)]


def _layer(spec: ModelSpec, index: int, *, sequences: int, tokens: int, positions: int) -> LayerWork:
    layer, routed = spec.layers[index], spec.experts
    dense_bytes, weights = _dense(spec, index)
    remembered = sum(
        shape.size * shape.dtype.itemsize for shape in cache_shapes(spec, layer.kind, 1, max(1, positions))
    )
    experts = distinct_experts(routed.count, routed.top_k, tokens) if layer.ffn == "moe" else 0.0
    active = routed.top_k * math.prod(spec.block_shape) if layer.ffn == "moe" else 0
    return LayerWork(
        read_bytes=dense_bytes + sequences * remembered + experts * spec.block_bytes,
        operations=2.0 * tokens * (weights + active),
        expert_operations=2.0 * tokens * active,
        experts=experts,
    )


def _head(spec: ModelSpec, rows: int) -> LayerWork:
    weights = spec.vocab * spec.hidden
    return LayerWork(
        read_bytes=float(weights * spec.itemsize), operations=2.0 * rows * weights, expert_operations=0.0, experts=0.0
    )


@functools.lru_cache(maxsize=1024)
def _dense(spec: ModelSpec, index: int) -> tuple[int, int]:
    """Bytes and number of a layer's own weights."""
    shapes = _shapes(spec)
    arrays = [shapes[name] for name in leaf_names(spec, index)]
    return sum(a.size * a.dtype.itemsize for a in arrays), sum(a.size for a in arrays)


_shapes = functools.lru_cache(maxsize=16)(dense_shapes)
