"""How a family names its tensors on disk."""

import dataclasses
from typing import Literal

ExpertLayout = Literal["per_expert", "fused", "stacked", "transposed", "interleaved", "mxfp4", "fp8", "by_stack"]
"""How experts lie on disk, of a layer:

per_expert: a tensor a projection and expert, what the hub mostly holds.
fused: `experts.gate_up_proj` `[E, 2F, D]` and `experts.down_proj` `[E, D, F]`, what transformers 5 holds in memory.
stacked: the same under other names, `input_linear.weight` and `output_linear.weight`.
transposed: `experts.gate_up_proj` `[E, D, 2F]` and `experts.down_proj` `[E, F, D]`.
interleaved: the same, with columns of gate and up in turn, and biases (gpt-oss in floats).
fp8: as per_expert, each tensor in FP8 with its scales in another, `x.weight_scale_inv` beside `x.weight`.
mxfp4: 4-bit codes and scales of the same matrices, each transposed, with biases (gpt-oss as released).
by_stack: as per_expert, without gates, below the blocks of an encoder and of a decoder.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """Names of modules and tensors, each below the one that holds it.

    Attributes:
      model: what all but the head is in.
      attn, delta_net: what mixes tokens, below the layer.
      moe: a layer's router and experts.
      fused_moe: the same where transformers 5 has fused the experts.
      dense: a dense layer's network.
      router: its linear layer, below `moe`.
      select_bias: below the layer; it may have leading axes of one, `select_bias_shape` before E.
      shared, shared_gate: the shared expert and its gate, below `moe`.
      gate, up, down: an expert's projections, where each expert is stored by itself.
      experts: the layouts that a checkpoint may have, the released one first.
      unused: patterns of tensors that come with released checkpoints and that the language model does not use;
        `{layers}` is the number of its layers, so braces are doubled.
    """

    model: str = "model"
    head: str = "lm_head"
    attn: str = "self_attn"
    delta_net: str = "linear_attn"
    moe: str = "mlp"
    fused_moe: str = "mlp"
    dense: str = "mlp"
    router: str = "gate"
    select_bias: str = "mlp.gate.e_score_correction_bias"
    select_bias_shape: tuple[int, ...] = ()
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    experts: tuple[ExpertLayout, ...] = ("per_expert", "fused")
    unused: tuple[str, ...] = ()
