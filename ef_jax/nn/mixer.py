"""What mixes the tokens of a layer: which module, and what it remembers of the tokens before."""

import jax
from flax import nnx

from ef_jax.errors import UnsupportedError
from ef_jax.nn.attention import Attention, attention_cache
from ef_jax.nn.latent_attention import LatentAttention, latent_cache
from ef_jax.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, ModelSpec


def make_mixer(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """The module that mixes tokens in layers of a kind, called as `Attention` is."""
    attention = _attention(spec, kind)
    if isinstance(attention, LatentAttentionSpec):
        return LatentAttention(spec, attention, rngs=rngs)
    return Attention(spec, attention, rope=kind.rope, rngs=rngs)


def cache_shapes(spec: ModelSpec, kind: LayerSpec, rows: int, context: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what a layer of a kind remembers of `rows` sequences of up to `context` tokens."""
    attention = _attention(spec, kind)
    if isinstance(attention, LatentAttentionSpec):
        return (latent_cache(spec, attention, rows, context),)
    cache = attention_cache(spec, attention, rows, context)
    return cache, cache


def _attention(spec: ModelSpec, kind: LayerSpec) -> AttentionSpec | LatentAttentionSpec:
    if kind.mixer != "attention":
        raise UnsupportedError(f"layers that mix tokens by {kind.mixer} are not implemented")
    return spec.attention
