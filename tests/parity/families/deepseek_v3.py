"""DeepSeek-V3: latent attention, a sigmoid router with a bias for selection, limited to groups by their two best."""

from typing import Any

from tests.parity.families import _common, deepseek_v2

SIZES: dict[str, Any] = deepseek_v2.SIZES | {
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    (2, {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False}),
    (3, {"first_k_dense_replace": 0, "tie_word_embeddings": True, "n_shared_experts": 2}),
    (4, {"rope_parameters": _common.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek_v3": (13, {"rope_parameters": _common.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
}
