"""What mixes the tokens of a layer: which module, and what it remembers of the tokens before."""

import jax
from flax import nnx

from ef_jax.nn.attention import Attention, attention_cache
from ef_jax.nn.delta_net import GatedDeltaNet, delta_net_cache
from ef_jax.nn.latent_attention import LatentAttention, latent_cache
from ef_jax.nn.t5_attention import CrossAttention, RelativeAttention, relative_cache
from ef_jax.spec import (
    AttentionSpec,
    DeltaNetSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    RelativeAttentionSpec,
)

Mixer = Attention | LatentAttention | RelativeAttention | GatedDeltaNet


def make_mixer(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> Mixer:
    """The module that mixes tokens in layers of a kind, called as `Attention` is."""
    mixer = _mixer(spec, kind)
    if isinstance(mixer, DeltaNetSpec):
        return GatedDeltaNet(spec, mixer, rngs=rngs)
    if isinstance(mixer, LatentAttentionSpec):
        return LatentAttention(spec, mixer, rngs=rngs)
    if isinstance(mixer, RelativeAttentionSpec):
        return RelativeAttention(spec, mixer, both_ways=kind.stack == "encoder", rngs=rngs)
    return Attention(spec, mixer, rope=kind.rope, rngs=rngs)


def make_reader(spec: ModelSpec, kind: LayerSpec, rngs: nnx.Rngs) -> CrossAttention | None:
    """The module by which layers of a kind read what an encoder made of the prompt; None where they do not."""
    if not spec.encodes or kind.stack == "encoder" or not isinstance(spec.attention, RelativeAttentionSpec):
        return None
    return CrossAttention(spec, spec.attention, rngs=rngs)


def cache_shapes(spec: ModelSpec, kind: LayerSpec, rows: int, context: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what a layer of a kind remembers of `rows` sequences of up to `context` tokens."""
    mixer = _mixer(spec, kind)
    if isinstance(mixer, DeltaNetSpec):
        return delta_net_cache(spec, mixer, rows)
    if isinstance(mixer, LatentAttentionSpec):
        return (latent_cache(spec, mixer, rows, context),)
    if isinstance(mixer, RelativeAttentionSpec):
        return () if kind.stack == "encoder" else relative_cache(spec, mixer, rows, context)
    cache = attention_cache(spec, mixer, rows, context)
    return cache, cache


def _mixer(
    spec: ModelSpec, kind: LayerSpec
) -> AttentionSpec | LatentAttentionSpec | RelativeAttentionSpec | DeltaNetSpec:
    # Specs with such layers have a delta net.
    return spec.delta_net if kind.mixer == "delta_net" and spec.delta_net is not None else spec.attention
