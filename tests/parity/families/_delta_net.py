"""What the small configurations of families with gated DeltaNet have in common."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = {name: size for name, size in _common.SIZES.items() if name != "intermediate_size"} | {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "head_dim": 16,
    "num_experts": 6,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}

LONGER: dict[str, Any] = {"num_hidden_layers": 4, "full_attention_interval": 4}
ATTENTION_FIRST: dict[str, Any] = {"layer_types": ["full_attention", "linear_attention"]}
PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
EQUAL_HEADS: dict[str, Any] = {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}

TOLERANCE = 1e-3
"""Transformers' own two forms, chunks and token by token, differ by up to 5e-4 on these: where a head nearly cancels,
its norm scales up what rounding has left of it."""
