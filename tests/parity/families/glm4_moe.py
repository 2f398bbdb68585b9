"""GLM-4.5: half of each head is rotated, norms of queries and keys or not, the router of DeepSeek-V3."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "head_dim": 12,
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"use_qk_norm": True, "routed_scaling_factor": 2.5}),
    (2, {"n_group": 3, "topk_group": 2, "attention_bias": False, "norm_topk_prob": False, "tie_word_embeddings": True}),
    (3, {"first_k_dense_replace": 0, "n_shared_experts": 2, "rope_parameters": _common.YARN}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"glm4_moe": (15, {"use_qk_norm": True})}
