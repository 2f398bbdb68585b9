"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a cache of what keys and values are made from."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from ef_jax.nn.attention import QUERY_BLOCK, attend, position_cache, read_cache, write_cache
from ef_jax.nn.linear import MIN_ROWS, Linear, normal_param
from ef_jax.nn.norm import Norm
from ef_jax.nn.rope import apply_rope, rope_tables
from ef_jax.spec import LatentAttentionSpec, ModelSpec
from pallas_kernels import from_storage

ROWS_AT_ONCE = 1024
"""Rows, one a query and head, that are scored at once: all heads share the one key, so few queries make many rows."""


def latent_cache(spec: ModelSpec, attention: LatentAttentionSpec, rows: int, context: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one layer's cache, `[R, 1, C, kv_rank + rope_dim]`: a position's latent, its rotated key."""
    return position_cache(rows, 1, context, attention.kv_rank + attention.rope.dim, spec.dtype)


class LatentAttention(nnx.Module):
    """Queries (compressed or not), latents of keys and values, attention among them, output.

    A head's keys and values are `k_up` and `v_up` of the latents. They are never made: `k_up` is applied to the query
    instead, which then meets the latents themselves, and `v_up` to the sum of latents that comes out. So a step reads
    kv_rank + rope_dim elements a position, not heads x (nope_dim + rope_dim + value_dim). Long prompts pay for it with
    (2 kv_rank + 2 rope_dim) / (nope_dim + rope_dim + value_dim) times the multiplications of plain attention.

    Of a device that shares the heads with others (`ModelSpec.tensor_shares`): its own heads, and all of the latents.
    """

    def __init__(self, spec: ModelSpec, attention: LatentAttentionSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        heads, rank, turned = attention.heads, attention.kv_rank, attention.rope.dim
        query_width = heads * (attention.nope_dim + turned)
        self.spec = attention

        def norm(width: int) -> Norm:
            return Norm(width, kind="rms", eps=attention.norm_eps, dtype=dtype)

        def linear(inputs: int, outputs: int, *, bias: bool = False, shares: int = 1) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, rngs=rngs, shares=shares)

        if attention.query_rank is None:
            self.q_proj = linear(spec.hidden, query_width)
        else:
            self.q_down = linear(spec.hidden, attention.query_rank, bias=attention.bias)
            self.q_norm = norm(attention.query_rank)
            self.q_up = linear(attention.query_rank, query_width)
        self.kv_down = linear(spec.hidden, rank + turned, bias=attention.bias)
        self.kv_norm = norm(rank)
        self.k_up = normal_param((heads, attention.nope_dim, rank), dtype, rngs)
        self.v_up = normal_param((heads, attention.value_dim, rank), dtype, rngs)
        width = heads * attention.value_dim
        self.o_proj = linear(width, spec.hidden, bias=attention.bias, shares=spec.tensor_shares)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        reach: Int32[Array, "2"],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The attention output and the cache with this call's latents written; see `DecoderLayer.attend`."""
        spec = self.spec
        query, new = self._queries(x), self.kv_down(x)
        nope, turned = jnp.split(query, (spec.nope_dim,), axis=-1)
        latent, key = jnp.split(new, (spec.kv_rank,), axis=-1)
        tables = rope_tables(spec.rope, positions)
        turned, key = (apply_rope(part, *tables, spec.rope) for part in (turned, key[:, :, None]))
        new = jnp.concatenate([self.kv_norm(latent)[:, :, None], key], axis=-1)
        written = write_cache(cache[0], new, positions, rows)
        seen = from_storage(read_cache(written, span, rows), x.dtype)

        query = jnp.concatenate([_by_head(nope, self.k_up[...]), turned], axis=-1)
        scale = (spec.nope_dim + spec.rope.dim) ** -0.5 if spec.scale is None else spec.scale
        # The rotated keys are summed up with the latents: cheaper than a copy of the latents without them.
        block = min(QUERY_BLOCK, max(1, ROWS_AT_ONCE // spec.heads))
        mixed = attend(query, seen, seen, positions, reach, scale=scale, query_block=block)
        out = _by_head(mixed[..., : spec.kv_rank], self.v_up[...].swapaxes(1, 2))
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (written,)

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H w"]:
        wide = self.q_proj(x) if self.spec.query_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        return wide.reshape(*x.shape[:2], self.spec.heads, -1)


def _by_head(x: Float[Array, "B T H I"], weight: Float[Array, "H I O"]) -> Float[Array, "B T H O"]:
    """Each head's elements through a matrix of its own, rounded once from float32."""
    flat = x.reshape(-1, *x.shape[2:])
    rows = len(flat)
    if x.dtype.itemsize == 2 and rows < MIN_ROWS:
        flat = jnp.pad(flat, ((0, MIN_ROWS - rows), (0, 0), (0, 0)))
    out = jnp.einsum("mhi,hio->hmo", flat, weight, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)[:, :rows].swapaxes(0, 1).reshape(*x.shape[:3], -1)
