"""What a model is: frozen, hashable specs that every other part is built from.

A `ModelSpec` is made from a checkpoint's `config.json` by `ef_jax.families`; nothing after that reads the
config again. Shape letters are the design's: L layers, E experts a layer, K experts a token, D hidden size,
F expert width, V vocabulary.
"""

import dataclasses
import math
from typing import Any, Literal

from ef_jax.errors import UnsupportedError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    `kind` is transformers' `rope_type`. Fields a kind does not use keep their defaults. `attention_factor`
    multiplies cos and sin (yarn); None means the kind's own formula.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _require(self.theta > 0, f"rope theta must be positive, got {self.theta}")
        _require(self.dim > 0 and self.dim % 2 == 0, f"rope dim must be even and positive, got {self.dim}")
        _require(self.factor > 0, f"rope factor must be positive, got {self.factor}")
        if self.kind in ("yarn", "llama3"):
            _require(
                self.original_max_position is not None and self.original_max_position > 0,
                f"rope kind {self.kind!r} needs original_max_position, got {self.original_max_position}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. `qk_norm`: None, "head" (over head_dim, Qwen3) or "full" (over all heads, OLMoE)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            _require(getattr(self, name) > 0, f"attention {name} must be positive, got {getattr(self, name)}")
        _require(
            self.heads % self.kv_heads == 0,
            f"attention heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})",
        )
        _require(self.clip_qkv is None or self.clip_qkv > 0, f"clip_qkv must be positive, got {self.clip_qkv}")

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection: queries, keys, values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterGroups:
    """Group-limited selection: `keep` of `count` groups, scored by `score`; the others are masked to `mask`."""

    count: int
    keep: int
    score: Literal["top2_sum", "max"]
    mask: float = -math.inf

    def __post_init__(self) -> None:
        _require(0 < self.keep <= self.count, f"router keeps {self.keep} of {self.count} groups")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterNormalize:
    """Divide the chosen weights by their sum plus `eps`, the sum clamped from below by `minimum` where given."""

    eps: float = 0.0
    minimum: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """The eight fields that tell router families apart (families A to G of transformers' MoE models).

    score: how logits become scores. order: scores before or after the top-k choice. select_bias: a learned bias
    added for selection only. groups: group-limited selection. normalize: of the chosen weights; None: as they are.
    scale: factor on the weights. bias: the router's linear layer has one. dtype: of the logits' matmul and
    whether weights are cast back to the model's dtype ("model": matmul in the model's dtype, weights cast back;
    "model_keep_f32": same matmul, weights stay f32; "f32": f32 matmul, weights stay f32).
    """

    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    select_bias: bool = False
    groups: RouterGroups | None = None
    normalize: RouterNormalize | None = None
    scale: float = 1.0
    bias: bool = False
    dtype: Literal["model", "model_keep_f32", "f32"] = "model"

    def __post_init__(self) -> None:
        _require(
            self.order == "score_then_topk" or (self.groups is None and not self.select_bias),
            "a router that scores after top-k takes neither groups nor a selection bias",
        )
        _require(math.isfinite(self.scale) and self.scale > 0, f"router scale must be positive, got {self.scale}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """The routed experts of one MoE layer: E of them, K a token, width F. One expert block is `[3, F, D]`."""

    count: int
    top_k: int
    width: int
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        _require(self.count > 0, f"experts must be positive, got {self.count}")
        _require(self.width > 0, f"expert width must be positive, got {self.width}")
        _require(0 < self.top_k <= self.count, f"top-k must be between 1 and {self.count} experts, got {self.top_k}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpertSpec:
    """An expert that every token passes through; `gated`: its output is scaled by a sigmoid gate (Qwen2-MoE)."""

    width: int
    gated: bool

    def __post_init__(self) -> None:
        _require(self.width > 0, f"shared expert width must be positive, got {self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer: routed experts or a dense feed-forward network, full or sliding-window attention."""

    ffn: Literal["moe", "dense"]
    window: int | None = None

    def __post_init__(self) -> None:
        _require(self.window is None or self.window > 0, f"sliding window must be positive, got {self.window}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only MoE language model."""

    family: str
    vocab: int
    hidden: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    layers: tuple[LayerSpec, ...]
    attention: AttentionSpec
    router: RouterSpec
    experts: ExpertSpec
    shared: SharedExpertSpec | None = None
    dense_width: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "max_position"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(bool(self.moe_layers), "the model has no MoE layer: there are no experts to keep in host memory")
        if any(layer.ffn == "dense" for layer in self.layers):
            _require(
                self.dense_width is not None and self.dense_width > 0,
                f"dense layers need a positive dense_width, got {self.dense_width}",
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have routed experts, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.ffn == "moe")

    @property
    def total_experts(self) -> int:
        """Expert blocks of the whole model: MoE layers x E."""
        return len(self.moe_layers) * self.experts.count

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of one packed expert block: gate, up, transposed down."""
        return (3, self.experts.width, self.hidden)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one expert block."""
        return math.prod(self.block_shape) * self.itemsize

    def as_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelSpec":
        """Rebuild a spec from `as_dict` (after a trip through JSON).

        Raises:
          UnsupportedError: an unknown or missing field, or a value that the specs refuse.
        """
        try:
            fields = dict(data)
            attention = dict(fields["attention"])
            attention["rope"] = RopeSpec(**attention["rope"])
            router = dict(fields["router"])
            router["groups"] = RouterGroups(**router["groups"]) if router["groups"] else None
            router["normalize"] = RouterNormalize(**router["normalize"]) if router["normalize"] else None
            fields["attention"] = AttentionSpec(**attention)
            fields["router"] = RouterSpec(**router)
            fields["experts"] = ExpertSpec(**fields["experts"])
            fields["shared"] = SharedExpertSpec(**fields["shared"]) if fields["shared"] else None
            fields["layers"] = tuple(LayerSpec(**layer) for layer in fields["layers"])
            fields["eos_ids"] = tuple(fields["eos_ids"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise UnsupportedError(f"not a model spec of this version: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsupportedError(message)
