"""Decoder layers and the whole decoder, without the routed experts, which live outside the modules.

A step over one MoE layer is `attend`, `route`, the routed experts (the engine's), `finish`; a dense layer skips the
middle two. Parameter paths (`layers.0.attn.qkv_proj.weight`) are also the names in converted checkpoints.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Shaped

from ef_jax.errors import UnsupportedError
from ef_jax.nn.attention import Attention
from ef_jax.nn.ffn import GatedFFN
from ef_jax.nn.linear import Linear, matmul_f32, normal_param
from ef_jax.nn.norm import RMSNorm
from ef_jax.nn.router import Router
from ef_jax.spec import ModelSpec


class DecoderLayer(nnx.Module):
    """One decoder layer, MoE or dense; every layer of a kind has the same structure, so a program serves them all."""

    def __init__(self, spec: ModelSpec, ffn: Literal["moe", "dense"], *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        self.attn_norm = RMSNorm(spec.hidden, spec.norm_eps, dtype)
        self.attn = Attention(spec, rngs=rngs)
        self.ffn_norm = RMSNorm(spec.hidden, spec.norm_eps, dtype)
        moe, shared = ffn == "moe", spec.shared
        if not moe and spec.dense_width is None:
            raise UnsupportedError("a dense layer needs a dense_width in its spec, got None")
        # One assignment each: NNX takes an attribute for an array holder or not by its first value.
        self.router = (
            Router(
                spec.router,
                hidden=spec.hidden,
                experts=spec.experts.count,
                top_k=spec.experts.top_k,
                dtype=dtype,
                rngs=rngs,
            )
            if moe
            else None
        )
        self.shared = GatedFFN(spec, shared.width, gated=shared.gated, rngs=rngs) if moe and shared else None
        self.mlp = GatedFFN(spec, spec.dense_width, rngs=rngs) if spec.dense_width and not moe else None

    def attend(
        self,
        x: Float[Array, "B T D"],
        k: Shaped[Array, "R N C hd"],
        v: Shaped[Array, "R N C hd"],
        positions: Int32[Array, "B T"],
        window: Int32[Array, ""],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Shaped[Array, "R N C hd"], Shaped[Array, "R N C hd"]]:
        """The residual stream after attention, and the updated key and value caches.

        Args:
          x: residual stream.
          k: key cache (`cache_shape`) of context length C, indexed by position, with N key/value heads.
          v: value cache, likewise.
          positions: each token's position; negative marks padding, which writes nothing and whose output is
            finite and meaningless.
          window: a token at position p sees positions `p - window + 1 .. p`; `FULL_WINDOW` hides nothing. Traced,
            so that sliding and full layers share a compiled program.
          span: static; only the cache's first `span` positions are read, for steps that are known not to be past
            them: a multiple of `KEY_BLOCK`, or at most one. None reads all C. It changes no bit of the result.
          rows: each sequence's row of the caches; R and beyond marks padding, like a negative position. None: sequence
            b has row b, and there are as many rows.
        """
        with jax.named_scope("attend"):
            out, k, v = self.attn(self.attn_norm(x), k, v, positions, window, span, rows)
            return x + out, k, v

    def ffn_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normed residual stream that router, experts and dense network read."""
        return self.ffn_norm(x)

    def route(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Int32[Array, "B T K"], Float[Array, "B T K"]]:
        """`ffn_input(x)`, each token's expert ids, best first, and their weights. MoE layers only."""
        if self.router is None:
            raise ValueError("a dense layer has no router")
        with jax.named_scope("route"):
            h = self.ffn_input(x)
            return h, *self.router(h)

    def finish(
        self, x: Float[Array, "B T D"], h: Float[Array, "B T D"], routed: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B T D"]:
        """The residual stream after the feed-forward part.

        Args:
          x: residual stream after attention.
          h: `ffn_input(x)`.
          routed: the routed experts' weighted sum (MoE layer; the shared expert is added here), None (dense layer).
        """
        with jax.named_scope("finish"):
            if self.mlp is not None:
                return x + self.mlp(h)
            if routed is None:
                raise ValueError("an MoE layer needs the routed experts' output")
            return x + (routed if self.shared is None else routed + self.shared(h))


class TokenEnds(nnx.Module):
    """Both ends of a decoder: token embedding, final norm and output head (absent where embeddings are tied)."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        self.embed = Embedding(spec, rngs=rngs)
        self.norm = RMSNorm(spec.hidden, spec.norm_eps, dtype)
        self.head = None if spec.tie_embeddings else Linear(spec.hidden, spec.vocab, dtype=dtype, rngs=rngs)

    def embed_tokens(self, ids: Int32[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Embeddings of token ids in `[0, V)`."""
        return self.embed.weight[...][ids]

    def logits(self, x: Float[Array, "*rows D"]) -> Float32[Array, "*rows V"]:
        """Next-token logits of the residual stream after the last layer; never rounded to the model's dtype."""
        with jax.named_scope("logits"):
            head = self.embed if self.head is None else self.head
            return matmul_f32(self.norm(x), head.weight[...])


class Embedding(nnx.Module):
    """`weight` [V, D]."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.weight = normal_param((spec.vocab, spec.hidden), jnp.dtype(spec.dtype), rngs)


class Decoder(TokenEnds):
    """A whole decoder-only MoE model except its routed experts."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        super().__init__(spec, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(spec, layer.ffn, rngs=rngs) for layer in spec.layers])
