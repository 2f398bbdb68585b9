"""Qwen2-MoE: biased queries, keys and values, a gated shared expert, windows in every other layer."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "num_experts": 6,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {}),
    (2, {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True}),
    (3, {"mlp_only_layers": [0], "rope_parameters": _common.LLAMA3}),
    (4, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen2_moe": (
        12,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "rope_parameters": _common.LLAMA3},
    ),
}
