"""Decoder layers and the whole decoder, without the routed experts, which live outside the modules.

A step over one MoE layer is `attend`, `route`, the routed experts (the engine's), `finish`; a dense layer skips the
middle two. Parameter paths (`layers.0.attn.qkv_proj.weight`) are also the names in converted checkpoints.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.errors import UnsupportedError
from ef_jax.nn.ffn import GatedFFN
from ef_jax.nn.linear import Linear, along_last, matmul_f32, normal_param
from ef_jax.nn.mixer import make_mixer, make_reader
from ef_jax.nn.norm import make_norm
from ef_jax.nn.router import Router
from ef_jax.nn.shares import join_shares
from ef_jax.spec import LayerSpec, ModelSpec


class DecoderLayer(nnx.Module):
    """One decoder layer; every layer of a kind (`LayerSpec.kind`) has the same structure: a program serves them all."""

    def __init__(self, spec: ModelSpec, kind: LayerSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        self.residual_scale = spec.residual_scale
        self.attn_norm = make_norm(spec, spec.hidden)
        self.attn = make_mixer(spec, kind, rngs)
        self.cross = make_reader(spec, kind, rngs)
        self.cross_norm = None if self.cross is None else make_norm(spec, spec.hidden)
        self.ffn_norm = make_norm(spec, spec.hidden)
        moe, shared = kind.ffn == "moe", spec.shared
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
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        reach: Int32[Array, "2"],
        span: int | None = None,
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The residual stream after the mixer, and what it now remembers.

        Args:
          x: residual stream.
          cache: what it remembers of R sequences (`cache_shapes`): keys and values by position, or whatever it has.
          positions: each token's position; negative marks padding, which writes nothing and whose output is
            finite and meaningless.
          reach: how far a token sees (`reach_of`). Traced, so that sliding and full layers share a compiled program.
          span: static; only the cache's first `span` positions are read, for steps that are known not to be past
            them: a multiple of `KEY_BLOCK`, or at most one. None reads all C. It changes no bit of the result.
          rows: each sequence's row of the caches; R and beyond marks padding, like a negative position. None: sequence
            b has row b, and there are as many rows.
        """
        with jax.named_scope("attend"):
            out, cache = self.attn(self.attn_norm(x), cache, positions, reach, span, rows)
            x = self._add(x, out)
            if self.cross is not None and self.cross_norm is not None:
                x = self._add(x, self.cross(self.cross_norm(x), cache, positions, rows))
            return x, cache

    def remember(
        self,
        memory: Float[Array, "B T D"],
        cache: tuple[Array, ...],
        positions: Int32[Array, "B T"],
        rows: Int32[Array, " B"] | None = None,
    ) -> tuple[Array, ...]:
        """The cache with what the layer will read of prompts, see `CrossAttention.remember`. Needs an encoder."""
        if self.cross is None:
            raise ValueError("a layer of a model without an encoder reads no prompt")
        with jax.named_scope("remember"):
            return self.cross.remember(memory, cache, positions, rows)

    def ffn_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normed residual stream that router, experts and dense network read."""
        return self.ffn_norm(x)

    def route(
        self, x: Float[Array, "B T D"], lift: Float32[Array, " E"] | None = None
    ) -> tuple[Float[Array, "B T D"], Int32[Array, "B T K"], Float[Array, "B T K"]]:
        """`ffn_input(x)`, each token's expert ids, best first, and their weights; `lift` as `nn.route` has it. MoE
        layers only."""
        if self.router is None:
            raise ValueError("a dense layer has no router")
        with jax.named_scope("route"):
            h = self.ffn_input(x)
            return h, *self.router(h, lift)

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
                return self._add(x, self.mlp(h))
            if routed is None:
                raise ValueError("an MoE layer needs the routed experts' output")
            return self._add(x, routed if self.shared is None else routed + self.shared(h))

    def _add(self, x: Float[Array, "B T D"], part: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + _times(part, self.residual_scale)


class TokenEnds(nnx.Module):
    """Both ends of a decoder: token embedding, final norm and output head (absent where embeddings are tied).

    Of a device that shares the head with others (`ModelSpec.head_shares`): the head has its own part of the vocabulary.
    """

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        self.embed_scale, self.logits_divisor, self.shares = spec.embed_scale, spec.logits_divisor, spec.head_shares
        self.embed = Embedding(spec, rngs=rngs)
        self.norm = make_norm(spec, spec.hidden)
        self.encoder_norm = make_norm(spec, spec.hidden) if spec.encodes else None
        self.head = (
            None
            if spec.tie_embeddings
            else Linear(spec.hidden, spec.vocab // self.shares, bias=spec.head_bias, dtype=dtype, rngs=rngs)
        )

    def embed_tokens(self, ids: Int32[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Embeddings of token ids in `[0, V)`."""
        x = self.embed.weight[...][ids]
        return _times(x, self.embed_scale)

    def logits(self, x: Float[Array, "*rows D"]) -> Float32[Array, "*rows V"]:
        """Next-token logits of the residual stream after the last layer; never rounded to the model's dtype."""
        with jax.named_scope("logits"):
            head = self.embed if self.head is None else self.head
            logits = matmul_f32(self.norm(x), head.weight[...])
            if self.head is not None and self.head.bias is not None:
                logits = logits + along_last(self.head.bias[...].astype(jnp.float32), logits)
            logits = join_shares(logits, self.shares)
            return logits if self.logits_divisor == 1.0 else logits / self.logits_divisor


class Embedding(nnx.Module):
    """`weight` [V, D]."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.weight = normal_param((spec.vocab, spec.hidden), jnp.dtype(spec.dtype), rngs)


class Decoder(TokenEnds):
    """A whole decoder-only MoE model except its routed experts."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        super().__init__(spec, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(spec, layer.kind, rngs=rngs) for layer in spec.layers])


def _times(x: Float[Array, "*rows D"], factor: float) -> Float[Array, "*rows D"]:
    """`x * factor`, the factor not rounded to x's dtype."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)
