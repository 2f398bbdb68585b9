"""The routing-path predictor: a small encoder-decoder that tells a token's experts in all layers from token ids alone.

The encoder reads a prompt, the decoder the tokens generated since; one head gives the log-odds of every expert of every
layer. A token's path is known as soon as the token is, before its first layer runs.

After ExpertFlow-H (He et al., arXiv 2410.17954), which builds it from T5 with one bias-free head. Here the head has a
bias; a token attends to a window, so that a step costs the same after any number of tokens; scores on the prompt know
how long ago it was; and an id is embedded as what all ids share plus what is its own, so that ids never learned from
are predicted as unknown ones.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from ef_jax.errors import InputError
from ef_jax.nn.linear import along_last, matmul_f32
from ef_jax.nn.t5 import BUCKETS, Attention, FeedForward, Norm, PositionBias, both_ways, buckets, matrix

UNKNOWN = -1
"""Stands for a token of which nothing is known; so does any id outside the vocabulary."""

_EMBEDDING_GAIN = 8.0  # rows of the embedding are rarely met: they learn as much faster


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPathSpec:
    """What a routing-path predictor is built for.

    Attributes:
      layers: L, MoE layers.
      experts: E, experts a layer.
      top_k: K, experts a token.
      vocab: V.
      d_model: width of the residual stream.
      d_ff: hidden units of a feed-forward network.
      heads: of each attention; divides `d_model`.
      encoder_layers: may be 0: the decoder then reads the embeddings of the prompt.
      decoder_layers: at least 1.
      most_prompt: tokens of a prompt that the encoder reads, the last ones.
      window: generated tokens that a decoder layer sees, the token's own included.

    Raises:
      InputError: a size that cannot be.
    """

    layers: int
    experts: int
    top_k: int
    vocab: int
    d_model: int = 64
    d_ff: int = 256
    heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 2
    most_prompt: int = 128
    window: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "encoder_layers" else 1
            if value < least:
                raise InputError(f"a routing path's {field.name} must be at least {least}, got {value}")
        if self.top_k > self.experts:
            raise InputError(f"a routing path for {self.top_k} experts a token needs as many, got {self.experts}")
        if self.d_model % self.heads:
            raise InputError(f"a routing path's d_model must be a multiple of its {self.heads} heads: {self.d_model}")

    @property
    def kv_width(self) -> int:
        """Numbers of keys and values of one head, side by side."""
        return 2 * self.d_model // self.heads


class PathState(NamedTuple):
    """What R rows remember: by decoder layer (N), keys and values of prompts and of the last W generated tokens.

    Attributes:
      prompts: of each row's prompt.
      lengths: tokens of each row's prompt, at most P.
      recent: of generated tokens; that of number t is at place t mod W.
      positions: generated tokens so far.
    """

    prompts: Float[Array, "N R P H two_hd"]
    lengths: Int32[Array, " R"]
    recent: Float[Array, "N R W H two_hd"]
    positions: Int32[Array, " R"]


class EncoderBlock(nnx.Module):
    """Attention over the prompt, then a feed-forward network."""

    def __init__(self, spec: RoutingPathSpec, *, rngs: nnx.Rngs):
        self.attend = Attention(spec.d_model, spec.heads, rngs=rngs)
        self.think = FeedForward(spec.d_model, spec.d_ff, rngs=rngs)


class DecoderBlock(nnx.Module):
    """Attention over generated tokens, over the prompt, then a feed-forward network."""

    def __init__(self, spec: RoutingPathSpec, *, rngs: nnx.Rngs):
        self.attend = Attention(spec.d_model, spec.heads, rngs=rngs)
        self.look_up = Attention(spec.d_model, spec.heads, rngs=rngs)
        self.think = FeedForward(spec.d_model, spec.d_ff, rngs=rngs)


class RoutingPath(nnx.Module):
    """The predictor, float32. A fresh one predicts every expert with its base rate, K / E.

    Parameters: embeddings `tokens` [V, d] and `unknown` [d], the blocks, `head` [L E, d] and `head_bias` [L E].
    """

    def __init__(self, spec: RoutingPathSpec, *, rngs: nnx.Rngs):
        outputs = spec.layers * spec.experts
        self.spec = spec
        self.tokens = nnx.Param(jnp.zeros((spec.vocab, spec.d_model)))
        self.unknown = nnx.Param(jax.random.normal(rngs.params(), (spec.d_model,)))
        self.encoder = nnx.List([EncoderBlock(spec, rngs=rngs) for _ in range(spec.encoder_layers)])
        self.encoder_bias = PositionBias(2 * BUCKETS, spec.heads)
        self.encoder_norm = Norm(spec.d_model)
        self.decoder = nnx.List([DecoderBlock(spec, rngs=rngs) for _ in range(spec.decoder_layers)])
        self.decoder_bias = PositionBias(BUCKETS, spec.heads)
        self.prompt_bias = PositionBias(BUCKETS, spec.heads)
        self.norm = Norm(spec.d_model)
        self.head = matrix(outputs, spec.d_model, rngs)
        base = math.log((spec.top_k + 0.5) / (spec.experts - spec.top_k + 0.5))
        self.head_bias = nnx.Param(jnp.full((outputs,), base, jnp.float32))

    def __call__(
        self,
        prompts: Int32[Array, "B P"],
        lengths: Int32[Array, " B"],
        tokens: Int32[Array, "B T"],
        drop: Callable[[Array], Array] = lambda x: x,
    ) -> Float32[Array, "B T L E"]:
        """Log-odds that each generated token uses each expert, all tokens at once.

        Args:
          prompts: the last tokens of each prompt, from place 0 on; what is past its length is not looked at.
          lengths: of the prompts, 0 to P.
          tokens: generated tokens; what is past a row's end does not change what is before it.
          drop: dropout of a training, on embeddings and on what a block adds.
        """
        memory = encode(self, prompts, lengths, drop)
        place = jnp.arange(tokens.shape[1])
        distance = place[:, None] - place[None]
        visible = ((distance >= 0) & (distance < self.spec.window))[None]
        bias = self.decoder_bias(buckets(jnp.maximum(distance, 0))[None])
        prompt_bias, known = self._prompt_view(prompts.shape[1], lengths, jnp.broadcast_to(place, tokens.shape))
        x = drop(self.embed(tokens))
        for layer, block in enumerate(self.decoder):
            normed = block.attend.norm(x)
            x = x + drop(block.attend(normed, block.attend.keys_values(normed), bias, visible))
            x = x + drop(block.look_up(block.look_up.norm(x), memory[layer], prompt_bias, known))
            x = x + drop(block.think(x))
        return self.log_odds(x)

    def embed(self, ids: Int32[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """Embeddings of tokens."""
        table, unknown = self.tokens[...], self.unknown[...]
        known = (ids >= 0) & (ids < self.spec.vocab)
        own = table[jnp.where(known, ids, 0)]
        return along_last(unknown, own) + jnp.where(known[..., None], _EMBEDDING_GAIN * own, 0)

    def log_odds(self, x: Float[Array, "*rows d"]) -> Float32[Array, "*rows L E"]:
        """Of every expert of every layer, from the residual stream after the last block."""
        odds = matmul_f32(self.norm(x), self.head[...])
        odds = odds + along_last(self.head_bias[...].astype(jnp.float32), odds)
        return odds.reshape(*x.shape[:-1], self.spec.layers, self.spec.experts)

    def _prompt_view(
        self, width: int, lengths: Int32[Array, " B"], positions: Int32[Array, "B T"]
    ) -> tuple[Float[Array, "B H T P"], Array]:
        """Bias and visibility of the tokens of a prompt for generated tokens."""
        place = jnp.arange(width)
        distance = (positions + lengths[:, None])[:, :, None] - place[None, None]
        known = jnp.broadcast_to((place[None] < lengths[:, None])[:, None], distance.shape)
        return self.prompt_bias(buckets(jnp.maximum(distance, 0))), known


def encode(
    path: RoutingPath,
    prompts: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    drop: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "N B P H two_hd"]:
    """Keys and values of prompts for each decoder layer; arguments as in `RoutingPath.__call__`."""
    place = jnp.arange(prompts.shape[1])
    visible = jnp.broadcast_to((place[None] < lengths[:, None])[:, None], (*prompts.shape, len(place)))
    bias = path.encoder_bias(both_ways(place[:, None] - place[None])[None])
    x = drop(path.embed(prompts))
    for block in path.encoder:
        normed = block.attend.norm(x)
        x = x + drop(block.attend(normed, block.attend.keys_values(normed), bias, visible))
        x = x + drop(block.think(x))
    x = path.encoder_norm(x)
    return jnp.stack([block.look_up.keys_values(x) for block in path.decoder])


def decode(
    path: RoutingPath, state: PathState, rows: Int32[Array, " B"], tokens: Int32[Array, " B"]
) -> tuple[Float32[Array, "B L E"], PathState]:
    """Log-odds of one more token of some rows, and the state that has seen it.

    Equal to `RoutingPath.__call__` but for rounding, as long as the state holds `spec.window` tokens; a shorter one
    is a shorter window.

    Args:
      path: the predictor.
      state: of all R rows.
      rows: distinct; R and above are padding, which changes nothing and whose result means nothing.
      tokens: what these rows have taken.
    """
    size = state.recent.shape[2]
    positions = state.positions.at[rows].get(mode="clip")[:, None]
    lengths = state.lengths.at[rows].get(mode="clip")
    age = (positions - jnp.arange(size)[None]) % size
    visible = ((age <= positions) & (age < path.spec.window))[:, None]
    bias = path.decoder_bias(buckets(age)[:, None])
    prompt_bias, known = path._prompt_view(state.prompts.shape[2], lengths, positions)
    recent = state.recent
    x = path.embed(tokens)[:, None]
    for layer, block in enumerate(path.decoder):
        normed = block.attend.norm(x)
        own = block.attend.keys_values(normed)[:, 0].astype(recent.dtype)
        recent = recent.at[layer, rows, positions[:, 0] % size].set(own, mode="drop")
        x = x + block.attend(normed, recent[layer].at[rows].get(mode="clip"), bias, visible)
        seen = state.prompts[layer].at[rows].get(mode="clip")
        x = x + block.look_up(block.look_up.norm(x), seen, prompt_bias, known)
        x = x + block.think(x)
    after = state.positions.at[rows].add(1, mode="drop")
    return path.log_odds(x)[:, 0], state._replace(recent=recent, positions=after)


def join(
    path: RoutingPath, state: PathState, row: Int32[Array, ""], prompt: Int32[Array, " P"], length: Int32[Array, ""]
) -> PathState:
    """The state once a new sequence has taken a row.

    Args:
      path: the predictor.
      state: of all R rows.
      row: which.
      prompt: the last tokens of its prompt, from place 0 on; at most as many as the state holds.
      length: of the prompt.
    """
    memory = encode(path, prompt[None], length[None])
    at = (0, row, 0, 0, 0)
    return PathState(
        jax.lax.dynamic_update_slice(state.prompts, memory.astype(state.prompts.dtype), at),
        state.lengths.at[row].set(length),
        state.recent,
        state.positions.at[row].set(0),
    )


def empty_state(spec: RoutingPathSpec, *, rows: int, context: int) -> PathState:
    """The state of `rows` rows without a sequence; `jax.eval_shape` tells its size without allocating it.

    Args:
      spec: the predictor's.
      rows: R.
      context: generated tokens that will be followed. Where it is below `spec.window`, no more are kept.
    """
    layers, heads, width = spec.decoder_layers, spec.heads, spec.kv_width
    prompts = jnp.zeros((layers, rows, spec.most_prompt, heads, width))
    recent = jnp.zeros((layers, rows, min(spec.window, context), heads, width))
    return PathState(prompts, jnp.zeros(rows, jnp.int32), recent, jnp.zeros(rows, jnp.int32))
