"""Causal grouped-query attention over a key/value cache that is indexed by position."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Shaped

from ef_jax.nn.linear import MIN_ROWS, Linear
from ef_jax.nn.norm import RMSNorm
from ef_jax.nn.rope import apply_rope, rope_tables
from ef_jax.spec import ModelSpec
from pallas_kernels import from_storage, storage_dtype, to_storage

FULL_WINDOW = 2**30
"""The window that hides nothing: longer than any context, and safe to subtract from an int32 position."""

QUERY_BLOCK = 64
"""Queries scored at once; the workspace is bounded by `B x H x QUERY_BLOCK x C` floats."""


def cache_shape(spec: ModelSpec, batch: int, context: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one layer's key (or value) cache: `[B, N, C, hd]`, 16-bit floats as their bits.

    Bits, because XLA:CPU converts a whole bfloat16 cache to float32 and back to write one position (jax 0.10.2:
    954 us against 491 us for a step over 4,096 positions of 2 heads x 48).
    """
    shape = (batch, spec.attention.kv_heads, context, spec.attention.head_dim)
    return jax.ShapeDtypeStruct(shape, storage_dtype(spec.dtype))


def write_cache(
    cache: Shaped[Array, "B N C hd"], new: Float[Array, "B T N hd"], positions: Int32[Array, "B T"]
) -> Shaped[Array, "B N C hd"]:
    """The cache with `new` at its tokens' positions; negative positions and those beyond C are not written."""
    sequences = jnp.arange(cache.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.where(positions < 0, cache.shape[2], positions)  # a negative index would wrap around
    return cache.at[sequences, :, slots].set(to_storage(new), mode="drop")


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B N C hd"],
    v: Float[Array, "B N C hd"],
    positions: Int32[Array, "B T"],
    window: Int32[Array, ""],
) -> Float[Array, "B T H hd"]:
    """Attention of each query at position p over the cache entries j with `p - window < j <= p`.

    H heads share N key/value heads in runs of H / N. Scores and softmax are float32. Queries beyond
    `QUERY_BLOCK` are taken in blocks. A negative position marks padding: its output is finite and means nothing.
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
    # The queries of a key/value head's whole group become rows of one matmul.
    rows = q.reshape(batch, tokens, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, kv_heads, tokens * group, width)
    scores = jnp.einsum("bnrd,bncd->bnrc", rows, k, preferred_element_type=jnp.float32) * width**-0.5

    keys = jnp.arange(context, dtype=jnp.int32)[None, None]
    query = positions[..., None]
    visible = (keys <= query) & (keys > query - window)  # [B, T, C]
    visible = jnp.repeat(visible, group, axis=1)[:, None]
    # Not -inf: a padding row sees nothing, and its softmax must stay finite.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)

    out = jnp.einsum("bnrc,bncd->bnrd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)
    out = out.reshape(batch, kv_heads, tokens, group, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads, width)


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
        k: Shaped[Array, "B N C hd"],
        v: Shaped[Array, "B N C hd"],
        positions: Int32[Array, "B T"],
        window: Int32[Array, ""],
        span: int | None = None,
    ) -> tuple[Float[Array, "B T D"], Shaped[Array, "B N C hd"], Shaped[Array, "B N C hd"]]:
        """The attention output and the cache with this call's keys and values written; see `DecoderLayer.attend`."""
        query, key, value = self._project(x)
        cos, sin = rope_tables(self.spec.rope, positions)
        k = write_cache(k, apply_rope(key, cos, sin), positions)
        v = write_cache(v, value, positions)
        seen_k, seen_v = (from_storage(cache[:, :, :span], x.dtype) for cache in (k, v))
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
