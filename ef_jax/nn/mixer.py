"""What mixes the tokens of a layer: which module, and what it remembers of the tokens before."""

import jax
from flax import nnx

from ef_jax.errors import UnsupportedError
from ef_jax.nn.attention import Attention, attention_cache
from ef_jax.nn.latent_attention import LatentAttention, latent_cache
from ef_jax.nn.t5_attention import CrossAttention, RelativeAttention, relative_cache
from ef_jax.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, ModelSpec, RelativeAttentionSpec


def make_mixer(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> Attention | LatentAttention | RelativeAttention:
    """The module that mixes tokens in layers of a kind, called as `Attention` is."""
    attention = _attention(spec, kind)
    if isinstance(attention, LatentAttentionSpec):
        return LatentAttention(spec, attention, rngs=rngs)
    if isinstance(attention, RelativeAttentionSpec):
        return RelativeAttention(spec, attention, both_ways=kind.stack == "encoder", rngs=rngs)
    return Attention(spec, attention, rope=kind.rope, rngs=rngs)


def make_reader(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> CrossAttention | None:
    """The module by which layers of a kind read what an encoder made of the prompt; None where they do not."""
    if not spec.encodes or kind.stack == "encoder" or not isinstance(spec.attention, RelativeAttentionSpec):
        return None
    return CrossAttention(spec, spec.attention, rngs=rngs)


def cache_shapes(spec: ModelSpec, kind: LayerSpec, rows: int, context: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what a layer of a kind remembers of `rows` sequences of up to `context` tokens."""
    attention = _attention(spec, kind)
    if isinstance(attention, LatentAttentionSpec):
        return (latent_cache(spec, attention, rows, context),)
    if isinstance(attention, RelativeAttentionSpec):
        return () if kind.stack == "encoder" else relative_cache(spec, attention, rows, context)
    cache = attention_cache(spec, attention, rows, context)
    return cache, cache


def _attention(spec: ModelSpec, kind: LayerSpec) -> AttentionSpec | LatentAttentionSpec | RelativeAttentionSpec:
    if kind.mixer != "attention":
        raise UnsupportedError(f"layers that mix tokens by {kind.mixer} are not implemented")
    return spec.attention
