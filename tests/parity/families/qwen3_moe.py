"""Qwen3-MoE: norms of queries and keys, experts normalised or not, dense layers by list or step, every rope."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "num_experts": 6,
    "moe_intermediate_size": 20,
    "head_dim": 12,
    "norm_topk_prob": True,
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {}),
    (2, {"norm_topk_prob": False, "tie_word_embeddings": True}),
    (3, {"mlp_only_layers": [1], "attention_bias": True}),
    (4, {"num_hidden_layers": 4, "decoder_sparse_step": 2, "rope_parameters": _common.LINEAR}),
    (5, {"use_sliding_window": True, "sliding_window": 5, "rope_parameters": _common.LLAMA3}),
    (6, {"rope_parameters": _common.YARN, "hidden_act": "gelu_pytorch_tanh"}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_moe": (10, {}),
    "qwen3_moe_features": (
        11,
        {
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "rope_parameters": _common.YARN,
        },
    ),
}
