"""Causal grouped-query attention over a key/value cache that is indexed by position."""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Shaped

from ef_jax.nn.exponential import exp_of_negative
from ef_jax.nn.linear import MIN_ROWS, Linear
from ef_jax.nn.norm import RMSNorm
from ef_jax.nn.rope import apply_rope, rope_tables
from ef_jax.spec import ModelSpec
from pallas_kernels import from_storage, storage_dtype, to_storage

FULL_WINDOW = 2**30
"""The window that hides nothing: longer than any context, and safe to subtract from an int32 position."""

QUERY_BLOCK = 64
"""Queries scored at once; the workspace is bounded by `B x H x QUERY_BLOCK x C` floats."""

KEY_BLOCK = 256
"""Keys that are summed together. Blocks are added up in a fixed tree, in which those that a query does not see are
zeros, so that its result does not depend on how much of the cache a program reads."""

_ADDED_AT_ONCE = 16


def cache_shape(spec: ModelSpec, rows: int, context: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one layer's key (or value) cache: `[R, N, C, hd]`, 16-bit floats as their bits.

    C is the context, in whole key blocks if it is longer than one. Bits, because XLA:CPU converts a whole bfloat16
    cache to float32 and back to write one position (jax 0.10.2: 954 us against 491 us for a step over 4,096 positions
    of 2 heads x 48).
    """
    length = context if context <= KEY_BLOCK else context + -context % KEY_BLOCK
    shape = (rows, spec.attention.kv_heads, length, spec.attention.head_dim)
    return jax.ShapeDtypeStruct(shape, storage_dtype(spec.dtype))


def write_cache(
    cache: Shaped[Array, "R N C hd"],
    new: Float[Array, "B T N hd"],
    positions: Int32[Array, "B T"],
    rows: Int32[Array, " B"] | None = None,
) -> Shaped[Array, "R N C hd"]:
    """The cache with `new` at its tokens' rows and positions; see `DecoderLayer.attend`."""
    sequences = jnp.arange(cache.shape[0], dtype=jnp.int32) if rows is None else rows
    slots = jnp.where(positions < 0, cache.shape[2], positions)  # a negative index would wrap around
    return cache.at[sequences[:, None], :, slots].set(to_storage(new), mode="drop")


def read_cache(
    cache: Shaped[Array, "R N C hd"], span: int | None, rows: Int32[Array, " B"] | None
) -> Shaped[Array, "B N c hd"]:
    """The first `span` positions of some rows of a cache; None: all."""
    cache = cache[:, :, :span]
    return cache if rows is None else cache.at[rows].get(mode="clip")


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B N C hd"],
    v: Float[Array, "B N C hd"],
    positions: Int32[Array, "B T"],
    window: Int32[Array, ""],
) -> Float[Array, "B T H hd"]:
    """Attention of each query at position p over the cache entries j with `p - window < j <= p`.

    H heads share N key/value heads in runs of H / N. Scores and softmax are float32. Queries beyond
    `QUERY_BLOCK` are taken in blocks. A negative position marks padding: its output is finite and means nothing. C is
    at most `KEY_BLOCK` or a multiple of it; how many blocks there are past p changes no bit of the result.
    """
    batch, tokens, heads, width = q.shape
    if tokens > QUERY_BLOCK:
        padded = tokens + -tokens % QUERY_BLOCK
    elif tokens == 1 and heads == k.shape[1] and q.dtype.itemsize == 2:
        padded = MIN_ROWS  # one row a key/value head: the slow matrix-vector product that `linear` avoids too
    else:
        padded = tokens
    if padded > tokens:
        q = jnp.pad(q, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, padded - tokens)), constant_values=-1)
    if padded <= QUERY_BLOCK:
        return _attend_block(q, k, v, positions, window)[:, :tokens]
    blocks = padded // QUERY_BLOCK
    q = q.reshape(batch, blocks, QUERY_BLOCK, heads, width).swapaxes(0, 1)
    positions = positions.reshape(batch, blocks, QUERY_BLOCK).swapaxes(0, 1)
    out = jax.lax.map(lambda block: _attend_block(block[0], k, v, block[1], window), (q, positions))
    return out.swapaxes(0, 1).reshape(batch, padded, heads, width)[:, :tokens]


def _attend_block(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B N C hd"],
    v: Float[Array, "B N C hd"],
    positions: Int32[Array, "B T"],
    window: Int32[Array, ""],
) -> Float[Array, "B T H hd"]:
    batch, tokens, heads, width = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # The queries of a key/value head's whole group become rows of one matmul a block of keys.
    rows = q.reshape(batch, tokens, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, kv_heads, 1, tokens * group, width)
    block = min(context, KEY_BLOCK)
    blocks = context // block
    rows = jnp.broadcast_to(rows, (batch, kv_heads, blocks, tokens * group, width))
    k, v = (part.reshape(batch, kv_heads, blocks, block, width) for part in (k, v))
    scores = jnp.einsum("bnkrd,bnkcd->bnkrc", rows, k, preferred_element_type=jnp.float32) * width**-0.5

    keys = jnp.arange(context, dtype=jnp.int32).reshape(1, blocks, 1, block)
    query = jnp.repeat(positions, group, axis=1)[:, None, :, None]
    visible = ((keys <= query) & (keys > query - window))[:, None]  # [B, 1, blocks, rows, block]
    # Not -inf: a padding row sees nothing, and its softmax must stay finite.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    powers = jnp.where(visible, exp_of_negative(scores - scores.max(axis=(2, 4), keepdims=True)), 0)
    total = _tree_sum(_row_sum(powers), axis=2)[:, :, None]
    weights = (powers / jnp.maximum(total, 1)).astype(q.dtype)  # the largest power is 1
    parts = jnp.einsum("bnkrc,bnkcd->bnkrd", weights, v, preferred_element_type=jnp.float32)
    out = _tree_sum(parts, axis=2).astype(q.dtype)
    out = out.reshape(batch, kv_heads, tokens, group, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads, width)


def _row_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows 1"]:
    """The sum of each row, in the same order however many rows there are.

    XLA:CPU takes the elements of a sum in another order in a vectorised loop than in another one, and which loops it
    vectorises depends on the size of the array. It leaves alone what is added one by one.
    """
    while (length := x.shape[-1]) > 1:
        parts = min(_ADDED_AT_ONCE, length)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % parts)])
        width = x.shape[-1] // parts
        columns = [x[..., part * width : (part + 1) * width] for part in range(parts)]
        x = functools.reduce(operator.add, columns)
    return x


def _tree_sum(x: Float[Array, "*dims"], axis: int) -> Float[Array, "*rest"]:
    """The sum along an axis, neighbours first: zeros at the end of the axis do not change a bit of it."""
    x = jnp.moveaxis(x, axis, 0)
    while len(x) > 1:
        if len(x) % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        x = x[0::2] + x[1::2]
    return x[0]


class Attention(nnx.Module):
    """Fused projection to queries, keys and values, optional norms and clipping, rope, attention, output."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        attention, dtype = spec.attention, jnp.dtype(spec.dtype)
        width = attention.heads * attention.head_dim
        self.spec = attention
        self.qkv_proj = Linear(spec.hidden, attention.qkv_width, bias=attention.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(width, spec.hidden, bias=attention.out_bias, dtype=dtype, rngs=rngs)
        if attention.qk_norm is not None:
            per_head = attention.qk_norm == "head"
            kv_width = attention.kv_heads * attention.head_dim
            self.q_norm = RMSNorm(attention.head_dim if per_head else width, spec.norm_eps, dtype)
            self.k_norm = RMSNorm(attention.head_dim if per_head else kv_width, spec.norm_eps, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        k: Shaped[Array, "R N C hd"],
        v: Shaped[Array, "R N C hd"],
        positions: Int32[Array, "B T"],
        window: Int32[Array, ""],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Shaped[Array, "R N C hd"], Shaped[Array, "R N C hd"]]:
        """The attention output and the cache with this call's keys and values written; see `DecoderLayer.attend`."""
        query, key, value = self._project(x)
        cos, sin = rope_tables(self.spec.rope, positions)
        k = write_cache(k, apply_rope(key, cos, sin), positions, rows)
        v = write_cache(v, value, positions, rows)
        seen_k, seen_v = (from_storage(read_cache(cache, span, rows), x.dtype) for cache in (k, v))
        out = attend(apply_rope(query, cos, sin), seen_k, seen_v, positions, window)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), k, v

    def _project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H hd"], Float[Array, "B T N hd"], Float[Array, "B T N hd"]]:
        spec = self.spec
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        query, key, value = jnp.split(self.qkv_proj(x), (width, width + kv_width), axis=-1)
        if spec.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        if spec.clip_qkv is not None:
            query, key, value = (jnp.clip(part, -spec.clip_qkv, spec.clip_qkv) for part in (query, key, value))
        query, key, value = (part.reshape(*x.shape[:2], -1, spec.head_dim) for part in (query, key, value))
        if spec.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value
