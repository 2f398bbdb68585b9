"""The modules' structure apart from their arrays: shapes for loading, graph definitions for compiled steps.

NNX modules cost far more than plain leaves at the boundary of `jax.jit`, so the engine passes lists of leaves and
merges them back into a module while tracing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from flax import nnx

from ef_jax.nn.decoder import DecoderLayer, TokenEnds
from ef_jax.spec import LayerSpec, ModelSpec

_M = TypeVar("_M", bound=nnx.Module)

_ENDS = ("norm.weight", "norm.bias", "encoder_norm.weight", "encoder_norm.bias", "head.weight", "head.bias")
_OF_STACK = ("attn.bias.weight",)
"""Leaves that all layers of a stack share; those of its first are in checkpoints."""


def layer_definition(spec: ModelSpec, kind: LayerSpec) -> tuple[nnx.GraphDef[DecoderLayer], tuple[str, ...]]:
    """The structure of layers of a kind and their leaves' paths (`attn.qkv_proj.weight`), in the order `merge_layer`
    takes them."""
    graphdef, shapes = _layer(spec, kind.kind)
    return graphdef, tuple(shapes)


def finish_paths(spec: ModelSpec) -> tuple[str, ...]:
    """Paths of the leaves that an MoE layer's `finish` reads: the shared expert's, where there is one."""
    return tuple(path for path in _moe_definition(spec)[1] if path.startswith("shared."))


def merge_finish(spec: ModelSpec, leaves: Sequence[jax.Array]) -> DecoderLayer:
    """An MoE layer good for `finish` alone, over the leaves of `finish_paths`; for use while tracing."""
    graphdef, paths = _moe_definition(spec)
    given = dict(zip(finish_paths(spec), leaves, strict=True))
    return nnx.graph.unflatten(graphdef, [given.get(path) for path in paths])


def top_definition(spec: ModelSpec) -> tuple[nnx.GraphDef[TokenEnds], tuple[str, ...]]:
    """The same for embedding, final norm and head, merged back by `merge_top`."""
    graphdef, shapes = _top(spec)
    return graphdef, tuple(shapes)


def merge_layer(graphdef: nnx.GraphDef[DecoderLayer], leaves: Sequence[jax.Array]) -> DecoderLayer:
    """The layer over these arrays, given in `layer_definition`'s order; for use while tracing."""
    return nnx.graph.unflatten(graphdef, list(leaves))


def merge_top(graphdef: nnx.GraphDef[TokenEnds], leaves: Sequence[jax.Array]) -> TokenEnds:
    """Embedding, final norm and head over these arrays, given in `top_definition`'s order."""
    return nnx.graph.unflatten(graphdef, list(leaves))


def leaf_names(spec: ModelSpec, index: int) -> tuple[str, ...]:
    """The arrays of `dense_shapes` that are a layer's leaves, in the order of `layer_definition`."""
    first = spec.step_layers[0] if spec.layers[index].stack == "decoder" else spec.prompt_layers[0]
    paths = layer_definition(spec, spec.layers[index])[1]
    return tuple(f"layers.{first if path in _OF_STACK else index}.{path}" for path in paths)


def dense_shapes(spec: ModelSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every array but the routed experts, in model order. Nothing is allocated."""
    top = _top(spec)[1]
    shapes = {"embed.weight": top["embed.weight"]}
    for index, layer in enumerate(spec.layers):
        shapes |= dict(zip(leaf_names(spec, index), _layer(spec, layer.kind)[1].values(), strict=True))
    return shapes | {path: top[path] for path in _ENDS if path in top}


def _moe_definition(spec: ModelSpec) -> tuple[nnx.GraphDef[DecoderLayer], tuple[str, ...]]:
    """Of the first MoE layer: what follows the router is the same in all."""
    return layer_definition(spec, spec.layers[spec.moe_layers[0]])


@functools.lru_cache(maxsize=64)
def _layer(spec: ModelSpec, kind: LayerSpec) -> tuple[nnx.GraphDef[DecoderLayer], dict[str, jax.ShapeDtypeStruct]]:
    return _define(lambda: DecoderLayer(spec, kind, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=16)
def _top(spec: ModelSpec) -> tuple[nnx.GraphDef[TokenEnds], dict[str, jax.ShapeDtypeStruct]]:
    return _define(lambda: TokenEnds(spec, rngs=nnx.Rngs(0)))


def _define(build: Callable[[], _M]) -> tuple[nnx.GraphDef[_M], dict[str, jax.ShapeDtypeStruct]]:
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
