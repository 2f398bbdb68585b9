"""What mixes the tokens of a layer: which module, and what it remembers of the tokens before."""

import jax
from flax import nnx

from ef_jax.errors import UnsupportedError
from ef_jax.nn.attention import Attention, attention_cache
from ef_jax.spec import AttentionSpec, LayerSpec, ModelSpec


def make_mixer(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> Attention:
    """The module that mixes tokens in layers of a kind, called as `Attention` is."""
    return Attention(spec, _attention(spec, kind), rope=kind.rope, rngs=rngs)


def cache_shapes(spec: ModelSpec, kind: LayerSpec, rows: int, context: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what a layer of a kind remembers of `rows` sequences of up to `context` tokens."""
    cache = attention_cache(spec, _attention(spec, kind), rows, context)
    return cache, cache


def _attention(spec: ModelSpec, kind: LayerSpec) -> AttentionSpec:
    if kind.mixer != "attention" or not isinstance(spec.attention, AttentionSpec):
        raise UnsupportedError(f"layers that mix tokens by {kind.mixer} with {spec.attention} are not implemented")
    return spec.attention
