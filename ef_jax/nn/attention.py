"""Causal grouped-query attention over a key/value cache that is indexed by position."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Shaped

from ef_jax.nn.exponential import invariant_exp
from ef_jax.nn.linear import MIN_ROWS, Linear
from ef_jax.nn.norm import Norm, l2_norm, make_norm
from ef_jax.nn.rope import apply_rope, rope_tables
from ef_jax.nn.shares import join_shares, own_share
from ef_jax.nn.sums import row_sum, tree_sum
from ef_jax.spec import AttentionSpec, LayerSpec, ModelSpec
from pallas_kernels import from_storage, storage_dtype, to_storage

_ALL = 2**30  # longer than any context, and safe to subtract from an int32 position

QUERY_BLOCK = 64
"""Queries scored at once; the workspace is bounded by `B x H x QUERY_BLOCK x C` floats."""

KEY_BLOCK = 256
"""Keys that are summed together. Blocks are added up in a fixed tree, in which those that a query does not see are
zeros, so that its result does not depend on how much of the cache a program reads."""

Places = tuple[Int32[Array, "..."], ...]
"""What is known of each query's place, `[B, T]`: its position, or more. Negative: padding, which sees nothing."""

See = Callable[[Places, Int32[Array, "..."]], tuple[Bool[Array, "..."], Float[Array, "..."] | None]]
"""Of queries' places and keys' positions that broadcast to `[B, ...]`: which keys a query sees, and what is added to
its scores, `[B, H, ...]`, or None for nothing."""


def reach_of(layer: LayerSpec | None = None) -> Int32[np.ndarray, "2"]:
    """How far the tokens of a layer see, as its programs take it: window and chunk. None: as far as there is."""
    if layer is None:
        return np.array([_ALL, _ALL], np.int32)
    return np.array([layer.window or _ALL, layer.chunk or _ALL], np.int32)


def position_cache(
    rows: int, heads: int, context: int, width: int, dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a cache that is indexed by position: `[R, N, C, hd]`, 16-bit floats as their bits.

    C is the context, in whole key blocks if it is longer than one. Bits, because XLA:CPU converts a whole bfloat16
    cache to float32 and back to write one position (jax 0.10.2: 954 us against 491 us for a step over 4,096 positions
    of 2 heads x 48).
    """
    length = context if context <= KEY_BLOCK else context + -context % KEY_BLOCK
    return jax.ShapeDtypeStruct((rows, heads, length, width), storage_dtype(dtype))


def attention_cache(spec: ModelSpec, attention: AttentionSpec, rows: int, context: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one layer's key (or value) cache."""
    return position_cache(rows, attention.kv_heads, context, attention.head_dim, spec.dtype)


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
    v: Float[Array, "B N C vd"],
    positions: Int32[Array, "B T"],
    reach: Int32[Array, "2"],
    *,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    query_block: int = QUERY_BLOCK,
) -> Float[Array, "B T H vd"]:
    """Attention of each query at position p over the cache entries j with `p - window < j <= p` in p's own chunk.

    `reach` is window and chunk, see `reach_of`; `scale` of the scores is `hd ** -0.5` if not given. A sink is a logit
    that takes part in its head's softmax and has no value. H heads share N key/value heads in runs of H / N; values
    may be of another width than keys. Scores and softmax are float32. Queries beyond `QUERY_BLOCK` are taken in
    blocks. A negative position marks padding: its output is finite and means nothing. C is at most `KEY_BLOCK` or a
    multiple of it; how many blocks there are past p changes no bit of the result.
    """

    def see(places: Places, keys: Int32[Array, "..."]) -> tuple[Bool[Array, "..."], None]:
        return see_back(places[0], keys, reach), None

    return attend_where(q, k, v, (positions,), see, scale=scale, sinks=sinks, query_block=query_block)


def see_back(query: Int32[Array, "..."], keys: Int32[Array, "..."], reach: Int32[Array, "2"]) -> Bool[Array, "..."]:
    """Which keys a query sees that looks back as far as `reach` says."""
    window, chunk = reach[0], reach[1]
    first = jax.lax.div(query, jnp.broadcast_to(chunk, query.shape)) * chunk  # `//` would take four more operations
    return (keys <= query) & (keys > query - window) & (keys >= first)


def attend_where(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B N C hd"],
    v: Float[Array, "B N C vd"],
    places: Places,
    see: See,
    *,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    query_block: int = QUERY_BLOCK,
) -> Float[Array, "B T H vd"]:
    """`attend` of queries that see what `see` makes of their places; with a bias, heads have keys of their own."""
    batch, tokens, heads, width = q.shape
    if tokens > query_block:
        padded = tokens + -tokens % query_block
    elif tokens == 1 and heads == k.shape[1] and q.dtype.itemsize == 2:
        padded = MIN_ROWS  # one row a key/value head: the slow matrix-vector product that `linear` avoids too
    else:
        padded = tokens
    if padded > tokens:
        q = jnp.pad(q, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
        places = tuple(jnp.pad(each, ((0, 0), (0, padded - tokens)), constant_values=-1) for each in places)
    scale = width**-0.5 if scale is None else scale
    if padded <= query_block:
        return _attend_block(q, k, v, places, see, scale, sinks)[:, :tokens]
    blocks = padded // query_block
    q = q.reshape(batch, blocks, query_block, heads, width).swapaxes(0, 1)
    places = tuple(each.reshape(batch, blocks, query_block).swapaxes(0, 1) for each in places)
    out = jax.lax.map(lambda block: _attend_block(block[0], k, v, block[1], see, scale, sinks), (q, places))
    return out.swapaxes(0, 1).reshape(batch, padded, heads, v.shape[-1])[:, :tokens]


def _attend_block(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B N C hd"],
    v: Float[Array, "B N C vd"],
    places: Places,
    see: See,
    scale: float,
    sinks: Float[Array, " H"] | None,
) -> Float[Array, "B T H vd"]:
    batch, tokens, heads, width = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # The queries of a key/value head's whole group become rows of one matmul a block of keys.
    rows = q.reshape(batch, tokens, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, kv_heads, 1, tokens * group, width)
    block = min(context, KEY_BLOCK)
    blocks = context // block
    rows = jnp.broadcast_to(rows, (batch, kv_heads, blocks, tokens * group, width))
    k, v = (part.reshape(batch, kv_heads, blocks, block, part.shape[-1]) for part in (k, v))
    scores = jnp.einsum("bnkrd,bnkcd->bnkrc", rows, k, preferred_element_type=jnp.float32) * scale

    keys = jnp.arange(context, dtype=jnp.int32).reshape(1, blocks, 1, block)
    visible, bias = see(tuple(jnp.repeat(each, group, axis=1)[:, None, :, None] for each in places), keys)
    visible = visible[:, None]  # [B, 1, blocks, rows, block]
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    # Not -inf: a padding row sees nothing, and its softmax must stay finite.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    highest = scores.max(axis=(2, 4), keepdims=True)
    if sinks is not None:
        # A row's head is that of its query in the group: rows are tokens, then heads of the group.
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, tokens))[None, :, None, :, None]
        highest = jnp.maximum(highest, sink)
    powers = jnp.where(visible, invariant_exp(scores - highest), 0)
    total = tree_sum(row_sum(powers), axis=2)[:, :, None]
    if sinks is not None:
        total = total + invariant_exp(sink - highest)
    weights = (powers / jnp.maximum(total, 1)).astype(q.dtype)  # the largest power is 1
    parts = jnp.einsum("bnkrc,bnkcd->bnkrd", weights, v, preferred_element_type=jnp.float32)
    out = tree_sum(parts, axis=2).astype(q.dtype)
    out = out.reshape(batch, kv_heads, tokens, group, -1).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, tokens, heads, -1)


class Attention(nnx.Module):
    """Fused projection to queries, keys and values, optional norms and clipping, rope, attention, output.

    Of a device that shares the heads with others (`ModelSpec.tensor_shares`): its own heads, to the output; norms over
    all heads have the weights of all.
    """

    def __init__(self, spec: ModelSpec, attention: AttentionSpec, *, rope: bool, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.spec, self.shares = attention, spec.tensor_shares
        self.rope = rope
        self.eps = spec.norm_eps
        self.qkv_proj = Linear(spec.hidden, attention.qkv_width, bias=attention.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(
            width, spec.hidden, bias=attention.out_bias, dtype=dtype, rngs=rngs, shares=spec.tensor_shares
        )
        self.sinks = nnx.Param(jnp.zeros((attention.heads,), dtype)) if attention.sinks else None
        if attention.qk_norm in ("head", "full"):
            per_head = attention.qk_norm == "head"
            self.q_norm = make_norm(spec, attention.head_dim if per_head else width * self.shares)
            self.k_norm = make_norm(spec, attention.head_dim if per_head else kv_width * self.shares)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        reach: Int32[Array, "2"],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The attention output and the keys and values with this call's written; see `DecoderLayer.attend`."""
        query, gate, key, value = self._project(x)
        query, key = self._place(query, positions), self._place(key, positions)
        if not self.rope and self.spec.temperature is not None:
            floor, scale = self.spec.temperature
            heat = 1 + scale * jnp.log1p(jnp.floor((positions[..., None, None].astype(jnp.float32) + 1) / floor))
            query = (query * heat).astype(query.dtype)
        k, v = write_cache(cache[0], key, positions, rows), write_cache(cache[1], value, positions, rows)
        seen_k, seen_v = (from_storage(read_cache(part, span, rows), x.dtype) for part in (k, v))
        sinks = None if self.sinks is None else self.sinks[...]
        out = attend(query, seen_k, seen_v, positions, reach, scale=self.spec.scale, sinks=sinks)
        out = out.reshape(*x.shape[:2], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(out), (k, v)

    def _project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H hd"], Float[Array, "B T w"] | None, Float[Array, "B T N hd"], Float[Array, "B T N hd"]
    ]:
        """Queries, gates, keys and values, not rotated yet."""
        spec = self.spec
        width, kv_width = spec.query_width, spec.kv_heads * spec.head_dim
        query, key, value = jnp.split(self.qkv_proj(x), (width, width + kv_width), axis=-1)
        gate = None
        if spec.gated:
            query, gate = jnp.split(query.reshape(*x.shape[:2], spec.heads, -1), 2, axis=-1)
            query, gate = (part.reshape(*x.shape[:2], -1) for part in (query, gate))
        if spec.qk_norm == "full":
            query, key = self._of_all_heads(self.q_norm, query), self._of_all_heads(self.k_norm, key)
        if spec.clip_qkv is not None:
            query, key, value = (jnp.clip(part, -spec.clip_qkv, spec.clip_qkv) for part in (query, key, value))
        query, key, value = (part.reshape(*x.shape[:2], -1, spec.head_dim) for part in (query, key, value))
        if spec.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, gate, key, value

    def _of_all_heads(self, norm: Norm, x: Float[Array, "B T w"]) -> Float[Array, "B T w"]:
        return own_share(norm(join_shares(x, self.shares)), self.shares)

    def _place(self, x: Float[Array, "B T H hd"], positions: Int32[Array, "B T"]) -> Float[Array, "B T H hd"]:
        """Queries or keys with their positions in them."""
        if not self.rope:
            return x
        x = apply_rope(x, *rope_tables(self.spec.rope, positions), self.spec.rope)
        return l2_norm(x, self.eps) if self.spec.qk_norm == "l2" else x
