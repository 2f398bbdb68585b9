"""T5's attention (Raffel et al. 2020, arXiv 1910.10683): scores are not scaled, but biased by relative position.

An encoder's tokens see their whole prompt, so it is one pass and nothing is remembered. A decoder's see the tokens up
to their own, from a cache, and what the encoder made of the prompt, whose keys and values are projected once.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from ef_jax.nn.attention import attend_where, position_cache, read_cache, see_back, write_cache
from ef_jax.nn.linear import Linear
from ef_jax.nn.t5 import PositionBias
from ef_jax.spec import ModelSpec, RelativeAttentionSpec
from pallas_kernels import from_storage


def distance_buckets(count: int, max_distance: int) -> Int32[np.ndarray, "distances"]:
    """Kind of each distance from 0 to `max_distance`, beyond which all are like it: the first half of the `count` kinds
    are single distances, the others cover ever longer runs.

    Reckoned in float32, in the order in which transformers does: a rounding decides where some runs end.
    """
    exact = count // 2
    distances = np.arange(max_distance + 1, dtype=np.int32)
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    coarse = np.minimum(exact + ratio.astype(np.int32), count - 1)
    return np.where(distances < exact, distances, coarse).astype(np.int32)


def relative_cache(
    spec: ModelSpec, attention: RelativeAttentionSpec, rows: int, context: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a decoder's layer remembers: its own keys and values, those of the prompt, and how long that is, `[R]`."""
    cache = position_cache(rows, attention.heads, context, attention.head_dim, spec.dtype)
    return cache, cache, cache, cache, jax.ShapeDtypeStruct((rows,), np.int32)


class RelativeAttention(nnx.Module):
    """Self-attention of an encoder (`both_ways`) or of a decoder; `bias.weight` [kinds, H] is that of its stack."""

    def __init__(self, spec: ModelSpec, attention: RelativeAttentionSpec, *, both_ways: bool, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        width = attention.heads * attention.head_dim
        self.spec, self.both_ways = attention, both_ways
        self.qkv_proj = Linear(spec.hidden, 3 * width, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(width, spec.hidden, dtype=dtype, rngs=rngs)
        self.bias = PositionBias(attention.buckets, attention.heads, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        reach: Int32[Array, "2"],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """As `Attention`; a decoder's `cache` begins with its keys and values, an encoder has none.

        The tokens of an encoder's call are all of their sequences, and as many as a cache would have positions.
        """
        query, key, value = (part.reshape(*x.shape[:2], self.spec.heads, -1) for part in self._project(x))
        if self.both_ways:
            k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
            last = jnp.where(positions < 0, -1, positions.max(axis=1, keepdims=True))
            out = attend_where(query, k, v, (positions, last), self._see_all, scale=1.0)
        else:
            written = write_cache(cache[0], key, positions, rows), write_cache(cache[1], value, positions, rows)
            k, v = (from_storage(read_cache(part, span, rows), x.dtype) for part in written)
            cache = (*written, *cache[2:])

            def see(places, keys):  # type: ignore[no-untyped-def]
                return see_back(places[0], keys, reach), self._biases(places[0], keys)

            out = attend_where(query, k, v, (positions,), see, scale=1.0)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _project(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T w"]]:
        return jnp.split(self.qkv_proj(x), 3, axis=-1)

    def _see_all(self, places, keys):  # type: ignore[no-untyped-def]
        positions, last = places
        return keys <= last, self._biases(positions, keys)

    def _biases(self, query: Int32[Array, "..."], keys: Int32[Array, "..."]) -> Float[Array, "..."]:
        """What each head adds, `[B, H, ...]`, for queries and keys at positions that broadcast to `[B, ...]`."""
        kinds = self.spec.buckets // 2 if self.both_ways else self.spec.buckets
        table = distance_buckets(kinds, self.spec.max_distance)
        ahead = keys - query
        distance = jnp.abs(ahead) if self.both_ways else jnp.maximum(-ahead, 0)
        kind = jnp.asarray(table)[jnp.minimum(distance, self.spec.max_distance)]
        if self.both_ways:
            kind = kind + jnp.where(ahead > 0, kinds, 0)
        return jnp.moveaxis(self.bias.weight[...][kind], -1, 1)


class CrossAttention(nnx.Module):
    """Attention of a decoder's tokens to the prompt, over keys and values that `remember` has cached; no bias."""

    def __init__(self, spec: ModelSpec, attention: RelativeAttentionSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        width = attention.heads * attention.head_dim
        self.spec = attention
        self.q_proj = Linear(spec.hidden, width, dtype=dtype, rngs=rngs)
        self.kv_proj = Linear(spec.hidden, 2 * width, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(width, spec.hidden, dtype=dtype, rngs=rngs)

    def remember(
        self,
        memory: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Array, ...]:
        """The cache of `relative_cache` with the keys and values of what an encoder made of whole prompts.

        Args:
          memory: the encoder's result.
          cache: of the layer.
          positions: of the prompts' tokens, negative for padding.
          rows: of each sequence; R for none.
        """
        key, value = jnp.split(self.kv_proj(memory), 2, axis=-1)
        key, value = (part.reshape(*memory.shape[:2], self.spec.heads, -1) for part in (key, value))
        own, (k, v, lengths) = cache[:2], cache[2:]
        index = jnp.arange(len(lengths), dtype=jnp.int32) if rows is None else rows
        lengths = lengths.at[index].set(positions.max(axis=1) + 1, mode="drop")
        return *own, write_cache(k, key, positions, rows), write_cache(v, value, positions, rows), lengths

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        rows: Int32[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the tokens of sequences read of their prompts; `rows` is where these are in the cache."""
        k, v, lengths = cache[2:]
        length = lengths if rows is None else lengths.at[rows].get(mode="clip")
        last = jnp.where(positions < 0, -1, length[:, None] - 1)
        query = self.q_proj(x).reshape(*x.shape[:2], self.spec.heads, -1)
        seen_k, seen_v = (from_storage(read_cache(part, None, rows), x.dtype) for part in (k, v))
        out = attend_where(query, seen_k, seen_v, (last,), _see_up_to, scale=1.0)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


def _see_up_to(places, keys):  # type: ignore[no-untyped-def]
    return keys <= places[0], None
