"""Which experts a token goes to."""

import dataclasses
import math
from typing import Literal

from ef_jax.spec._check import require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterGroups:
    """Group-limited selection: `keep` of `count` groups, scored by `score`; the others are masked to `mask`."""

    count: int
    keep: int
    score: Literal["top2_sum", "max"]
    mask: float = -math.inf

    def __post_init__(self) -> None:
        require(0 < self.keep <= self.count, f"router keeps {self.keep} of {self.count} groups")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterNormalize:
    """Divide the chosen weights by their sum plus `eps`, the sum clamped from below by `minimum` where given."""

    eps: float = 0.0
    minimum: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """The fields that tell router families apart (families A to I of transformers' MoE models).

    Attributes:
      score: how logits become scores.
      order: scores before or after the top-k choice.
      select_bias: a learned bias is added for selection only.
      groups: group-limited selection.
      normalize: of the chosen weights; None: as they are.
      scale: factor on the weights.
      bias: the router's linear layer has one.
      dtype: of the logits' matmul and of the weights. "model": matmul in the model's dtype, weights cast back to it;
        "model_keep_f32": same matmul, weights stay f32; "f32": f32 matmul, weights stay f32; "f32_cast_back": f32
        matmul, weights cast to the model's dtype.
      weight_dtype: of the router's stored matrix: the model's, or float32.
      sparse_mixer: jitter of Phi-MoE's sparse mixer, which takes the weight of each choice from a softmax over the
        logits within a threshold of it (arXiv 2409.12136); None: not.
      rounded_choice: the one expert is chosen by scores rounded to the model's dtype (Switch Transformers).
      capacity: tokens of a sequence that an expert takes in one pass over them; later ones have no expert (Switch
        Transformers, arXiv 2101.03961). None: all.
    """

    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    select_bias: bool = False
    groups: RouterGroups | None = None
    normalize: RouterNormalize | None = None
    scale: float = 1.0
    bias: bool = False
    dtype: Literal["model", "model_keep_f32", "f32", "f32_cast_back"] = "model"
    weight_dtype: Literal["model", "float32"] = "model"
    sparse_mixer: float | None = None
    rounded_choice: bool = False
    capacity: int | None = None

    def __post_init__(self) -> None:
        require(
            self.order == "score_then_topk" or (self.groups is None and not self.select_bias),
            "a router that scores after top-k takes neither groups nor a selection bias",
        )
        require(math.isfinite(self.scale) and self.scale > 0, f"router scale must be positive, got {self.scale}")
        require(
            self.sparse_mixer is None or (self.groups is None and not self.select_bias and self.normalize is None),
            "a sparse mixer takes neither groups nor a selection bias, and does not normalise",
        )

        require(
            not self.rounded_choice or (self.score == "softmax" and self.groups is None and not self.select_bias),
            "a router that chooses by rounded scores has a softmax, neither groups nor a selection bias",
        )
        require(self.capacity is None or self.capacity > 0, f"expert capacity must be positive, got {self.capacity}")

    @property
    def casts_back(self) -> bool:
        """Whether the weights are in the model's dtype; else in float32."""
        return self.dtype in ("model", "f32_cast_back")

    @property
    def normalizes(self) -> bool:
        """Whether a token's weights are shares of a sum over those that were chosen."""
        return self.normalize is not None or (self.order == "topk_then_score" and self.score == "softmax")

    @property
    def exact_logits(self) -> bool:
        """Whether the logits are computed in float32 throughout."""
        return self.dtype in ("f32", "f32_cast_back")
