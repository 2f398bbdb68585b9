"""Blocks of a small T5: pre-norm attention with a learned bias by relative position, and feed-forward networks.

After Raffel et al. 2020, arXiv 1910.10683, but for the scale of the scores, which T5 folds into its initialisation.
Weights are stored `[out, in]`; products are accumulated in float32 and rounded to the dtype of their input.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from ef_jax.nn.linear import linear, matmul_f32
from ef_jax.nn.norm import rms_norm

BUCKETS = 32
"""Kinds of relative positions, in each direction."""

_EXACT = BUCKETS // 2
_FARTHEST = 256  # distances from here on are alike
_EPS = 1e-6
_HIDDEN = -1e9


def buckets(distance: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Kind of each distance of 0 or more: exact up to 15, then ever coarser ones up to 256."""
    ratio = jnp.log(jnp.maximum(distance, 1) / _EXACT) / math.log(_FARTHEST / _EXACT)
    coarse = _EXACT + (ratio * (BUCKETS - _EXACT)).astype(distance.dtype)
    return jnp.where(distance < _EXACT, distance, jnp.minimum(coarse, BUCKETS - 1))


def both_ways(distance: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Kind of each distance, those of what comes later behind those of what came before: 2 x 32 in all."""
    return buckets(jnp.abs(distance)) + jnp.where(distance < 0, BUCKETS, 0)


class Norm(nnx.Module):
    """Root-mean-square norm; `weight` [d]."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return rms_norm(x, self.weight[...], _EPS)


class Attention(nnx.Module):
    """Pre-norm attention of H heads; `enter` [d, d] makes queries, `memory` [2 d, d] keys and values, `leave` [d, d].

    A head's sum of weights falls short of 1 by what a key of zeros would get: where nothing can be seen, nothing
    comes out.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = Norm(width)
        self.enter = matrix(width, width, rngs)
        self.memory = matrix(2 * width, width, rngs)
        self.leave = matrix(width, width, rngs)

    def keys_values(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows H two_hd"]:
        """Keys and values, side by side in each head, of what has been normed."""
        return linear(x, self.memory[...]).reshape(*x.shape[:-1], self.heads, -1)

    def __call__(
        self,
        normed: Float[Array, "B T d"],
        seen: Float[Array, "B C H two_hd"],
        bias: Float[Array, "#B H T C"],
        visible: Bool[Array, "#B T C"],
    ) -> Float[Array, "B T d"]:
        """What `normed` reads from the keys and values `seen`, where `visible`."""
        keys, values = jnp.split(seen, 2, axis=-1)
        queries = linear(normed, self.enter[...]).reshape(*normed.shape[:2], self.heads, -1)
        scores = jnp.einsum("bthd,bchd->bhtc", queries, keys, preferred_element_type=jnp.float32)
        scores = scores * keys.shape[-1] ** -0.5 + bias.astype(jnp.float32)
        scores = jnp.where(visible[:, None], scores, _HIDDEN)
        most = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), 0))
        weights = jnp.exp(scores - most)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(-most))
        read = jnp.einsum("bhtc,bchd->bthd", weights.astype(values.dtype), values)
        return linear(read.reshape(normed.shape), self.leave[...])


class FeedForward(nnx.Module):
    """Pre-norm network of one hidden layer, a rectifier; `enter` [f, d], `leave` [d, f]."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm = Norm(width)
        self.enter = matrix(hidden, width, rngs)
        self.leave = matrix(width, hidden, rngs)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        hidden = jax.nn.relu(matmul_f32(self.norm(x), self.enter[...])).astype(x.dtype)
        return linear(hidden, self.leave[...])


class PositionBias(nnx.Module):
    """`weight` [kinds, H]: what each head adds to its scores by kind of relative position."""

    def __init__(self, kinds: int, heads: int, dtype: jax.typing.DTypeLike = jnp.float32):
        self.weight = nnx.Param(jnp.zeros((kinds, heads), dtype))

    def __call__(self, kinds: Int[Array, "#B T C"]) -> Float[Array, "#B H T C"]:
        return self.weight[...][kinds].transpose(0, 3, 1, 2)


def matrix(outputs: int, inputs: int, rngs: nnx.Rngs) -> nnx.Param[Float32[Array, "out in"]]:
    """A matrix that keeps the size of what it multiplies."""
    return nnx.Param(inputs**-0.5 * jax.random.normal(rngs.params(), (outputs, inputs)))
