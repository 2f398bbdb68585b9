"""Rotary position embedding and its context-stretching variants, computed as transformers computes them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.nn.linear import along_last
from ef_jax.spec import ModelSpec, RelativeAttentionSpec, RopeSpec


def settle_rope(spec: ModelSpec, context: int) -> ModelSpec:
    """The model for sequences of up to `context` tokens: which factors its longrope divides by is settled.

    One set serves all positions of all sequences, the long one if a sequence may grow past `original_max_position`.
    (transformers goes by the longest sequence so far, and on crossing leaves keys in the cache as they were rotated
    before. Every sequence that is all on one side of `original_max_position` is the same here, if the context is on
    that side too.) Models of other kinds of rope come back as they are.
    """
    if isinstance(spec.attention, RelativeAttentionSpec):
        return spec
    rope = spec.attention.rope
    if rope.kind != "longrope" or rope.original_max_position is None:
        return spec
    rope = dataclasses.replace(rope, stretched=context > rope.original_max_position)
    return dataclasses.replace(spec, attention=dataclasses.replace(spec.attention, rope=rope))


def rope_frequencies(spec: RopeSpec) -> tuple[np.ndarray, float]:
    """Inverse frequencies, float32 `[dim / 2]` in radians a position, and the factor on cos and sin."""
    exponents = np.arange(0, spec.dim, 2, dtype=np.float32) / np.float32(spec.dim)
    frequencies = (np.float32(1) / np.float32(spec.theta) ** exponents).astype(np.float32)
    if spec.kind == "linear":
        return frequencies / np.float32(spec.factor), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, frequencies), _yarn_attention_factor(spec)
    if spec.kind == "llama3":
        return _llama3(spec, frequencies), 1.0
    if spec.kind == "longrope":
        factors = np.asarray(spec.long_factors if spec.stretched else spec.short_factors, np.float32)
        powers = np.float32(spec.theta) ** exponents
        return (np.float32(1) / (factors * powers)).astype(np.float32), _longrope_attention_factor(spec)
    return frequencies, 1.0


def rope_tables(
    spec: RopeSpec, positions: Int32[Array, "*rows"]
) -> tuple[Float32[Array, "*rows half"], Float32[Array, "*rows half"]]:
    """Cosine and sine for each position, float32; the two halves of a head share them."""
    frequencies, factor = rope_frequencies(spec)
    angles = positions[..., None].astype(jnp.float32)
    angles = angles * along_last(jnp.asarray(frequencies), angles)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "B T H hd"],
    cos: Float32[Array, "B T half"],
    sin: Float32[Array, "B T half"],
    spec: RopeSpec,
) -> Float[Array, "B T H hd"]:
    """Rotate the pairs among the first `spec.dim` elements of every head; the others pass.

    Pairs are `(x[i], x[i + dim/2])`, or neighbours `(x[2i], x[2i + 1])` where interleaved, and stay where they are.
    """
    dtype = jnp.dtype(jnp.float32) if spec.precise else x.dtype
    cos, sin = (table.astype(dtype)[:, :, None] for table in (cos, sin))
    turned = x[..., : spec.dim].astype(dtype)
    if spec.interleaved:
        pairs = turned.reshape(*turned.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    both = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(both, axis=-1).reshape(turned.shape) if spec.interleaved else jnp.concatenate(both, axis=-1)
    turned = turned.astype(x.dtype)
    return turned if spec.dim == x.shape[-1] else jnp.concatenate([turned, x[..., spec.dim :]], axis=-1)


def _yarn(spec: RopeSpec, frequencies: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071): interpolate the slow dimensions, keep the fast ones, ramp between."""
    context = spec.original_max_position
    if context is None:
        raise ValueError("yarn needs original_max_position")  # RopeSpec has already refused it

    def dimension(rotations: float) -> float:
        return spec.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(spec.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    return (frequencies / np.float32(spec.factor) * (1 - keep) + frequencies * keep).astype(np.float32)


def _yarn_attention_factor(spec: RopeSpec) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * mscale * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)


def _longrope_attention_factor(spec: RopeSpec) -> float:
    """LongRoPE (arXiv 2402.13753): how much longer contexts have become, by the logarithm."""
    given = spec.long_attention_factor if spec.stretched else None
    given = spec.attention_factor if given is None else given
    if given is not None:
        return given
    if spec.original_max_position is None:
        raise ValueError("longrope needs original_max_position")  # RopeSpec has already refused it
    return 1.0 if spec.factor <= 1 else math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_max_position))


def _llama3(spec: RopeSpec, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: divide long wavelengths by the factor, keep short ones, interpolate between."""
    context = spec.original_max_position
    if context is None:
        raise ValueError("llama3 needs original_max_position")  # RopeSpec has already refused it
    wavelength = 2 * math.pi / frequencies
    between = spec.high_freq_factor - spec.low_freq_factor or 1.0  # no wavelength is between equal factors
    smooth = (context / wavelength - spec.low_freq_factor) / between
    middle = (1 - smooth) * frequencies / spec.factor + smooth * frequencies
    stretched = np.where(wavelength > context / spec.low_freq_factor, frequencies / spec.factor, middle)
    return np.where(wavelength < context / spec.high_freq_factor, frequencies, stretched).astype(np.float32)
