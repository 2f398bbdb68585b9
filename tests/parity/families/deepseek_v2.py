"""DeepSeek-V2: latent attention, plain shared experts, a softmax router limited to the best groups by their maximum."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}

GROUPS: dict[str, Any] = {
    "topk_method": "group_limited_greedy",
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, GROUPS),
    (2, {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 1}),
    (3, GROUPS | {"first_k_dense_replace": 0, "tie_word_embeddings": True}),
    (4, {"rope_parameters": _common.YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek_v2": (
        12,
        GROUPS | {"rope_parameters": _common.YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "q_lora_rank": None},
    ),
}
