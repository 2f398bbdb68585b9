"""What mixes tokens in a layer: attention in its kinds, and gated linear recurrence."""

import dataclasses
from typing import Literal

from ef_jax.spec._check import require
from ef_jax.spec.rope import RopeSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Grouped-query attention.

    Attributes:
      qk_norm: None, "head" (over head_dim, Qwen3), "full" (over all heads, OLMoE) or "l2" (over head_dim, without
        weights, after the rotation and only where there is one, Llama 4).
      scale: of the scores; None: head_dim ** -0.5.
      sinks: a learned logit a head takes part in the softmax and has no value (gpt-oss).
      gated: queries come with gates, a head's `[query, gate]` side by side, whose sigmoid scales the output
        (Qwen3-Next).
      temperature: (floor, scale) of queries at position p in layers without rotation, which are multiplied by
        `1 + scale * log(1 + floor((p + 1) / floor))` (Llama 4); None: not.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full", "l2"] | None = None
    clip_qkv: float | None = None
    scale: float | None = None
    sinks: bool = False
    gated: bool = False
    temperature: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            require(getattr(self, name) > 0, f"attention {name} must be positive, got {getattr(self, name)}")
        require(
            self.heads % self.kv_heads == 0,
            f"attention heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        require(self.clip_qkv is None or self.clip_qkv > 0, f"clip_qkv must be positive, got {self.clip_qkv}")
        require(self.rope.dim <= self.head_dim, f"rope dim {self.rope.dim} is more than head_dim {self.head_dim}")

    @property
    def query_width(self) -> int:
        """Rows of the projection to queries, gates included."""
        return self.heads * self.head_dim * (2 if self.gated else 1)

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection: queries, keys, values."""
        return self.query_width + 2 * self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are kept compressed.

    A position's cache is a latent of `kv_rank` elements and one rotated key of `rope.dim`, shared by all heads.
    `query_rank`: queries are compressed too; None: projected straight. `scale`: of the scores; None: the width of a
    query, nope_dim + rope.dim, to the power -0.5. `norm_eps` is that of the latents' norms.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec
    norm_eps: float = 1e-6
    bias: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_rank", "nope_dim", "value_dim"):
            require(getattr(self, name) > 0, f"attention {name} must be positive, got {getattr(self, name)}")
        require(
            self.query_rank is None or self.query_rank > 0,
            f"query_rank must be positive or None, got {self.query_rank}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetSpec:
    """Gated DeltaNet (arXiv 2412.06464): a recurrent state `[key_dim, value_dim]` a value head instead of a cache.

    `key_heads` query and key heads serve `value_heads` value heads in runs. `conv_width`: taps of the causal
    convolution over queries, keys and values. `fused`: one projection gives queries, keys, values and gates by key head
    (Qwen3-Next), else four (Qwen3.5).
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    fused: bool

    def __post_init__(self) -> None:
        for name in ("key_heads", "value_heads", "key_dim", "value_dim", "conv_width"):
            require(getattr(self, name) > 0, f"delta net {name} must be positive, got {getattr(self, name)}")
        require(
            self.value_heads % self.key_heads == 0,
            f"delta net value_heads ({self.value_heads}) must be a multiple of key_heads ({self.key_heads})",
        )

    @property
    def conv_channels(self) -> int:
        """Channels that the convolution runs over: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RelativeAttentionSpec:
    """T5's attention (arXiv 1910.10683): a learned bias by relative position is added to scores that are not scaled.

    Distances fall into `buckets` kinds, ever coarser ones up to `max_distance`, in encoders half of them for what comes
    later. All layers of a stack share the bias of its first.
    """

    heads: int
    head_dim: int
    buckets: int
    max_distance: int

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "max_distance"):
            require(getattr(self, name) > 0, f"attention {name} must be positive, got {getattr(self, name)}")
        require(
            self.buckets > 0 and self.buckets % 4 == 0,
            f"relative position buckets must be a positive multiple of 4, got {self.buckets}",
        )
        require(
            self.max_distance > self.buckets // 2,
            f"relative positions must reach beyond {self.buckets // 2}, half of the buckets, got {self.max_distance}",
        )
