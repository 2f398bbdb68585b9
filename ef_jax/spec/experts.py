"""The experts of an MoE layer, routed and shared."""

import dataclasses
from typing import Literal

from ef_jax.spec._check import require

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """The routed experts of one MoE layer: E of them, K a token, width F. One expert block is `[3, F, D]`.

    Attributes:
      gated: `down(act(gate(x)) * up(x))`, in dense layers too; else `down(act(up(x)))`, in blocks of `[2, F, D]`
        (Switch Transformers).
      bias: the projections have biases.
      scale_input: the router's weight scales an expert's input, not its output (Llama 4).
      quantization: how the checkpoint stores the blocks, and so the host and the slots; None: in the model's dtype.
        "int8" and "int4" are roundings of ours, which lose something.
      group: weights that share a scale, of "int4".
    """

    count: int
    top_k: int
    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    scale_input: bool = False
    quantization: Literal["mxfp4", "fp8", "int8", "int4"] | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        require(self.count > 0, f"experts must be positive, got {self.count}")
        require(self.width > 0, f"expert width must be positive, got {self.width}")
        require(
            self.gated or (self.activation != "clamped_swiglu" and not self.bias and self.quantization is None),
            "experts without a gate have a plain activation, no biases and are not quantized",
        )
        require(
            (self.group is not None) == (self.quantization == "int4"),
            f"int4 experts and no others have a group, got {self.group} for {self.quantization}",
        )
        require(0 < self.top_k <= self.count, f"top-k must be between 1 and {self.count} experts, got {self.top_k}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedExpertSpec:
    """An expert that every token passes through; `gated`: its output is scaled by a sigmoid gate (Qwen2-MoE)."""

    width: int
    gated: bool

    def __post_init__(self) -> None:
        require(self.width > 0, f"shared expert width must be positive, got {self.width}")
