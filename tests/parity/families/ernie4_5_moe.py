"""ERNIE 4.5 MoE: shared experts or none, dense layers at either end and between, a floor under the weights' sum."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 20,
    "moe_num_shared_experts": 2,
    "head_dim": 12,
    "tie_word_embeddings": False,
}
del SIZES["num_experts_per_tok"]

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"tie_word_embeddings": True, "moe_num_shared_experts": 0, "moe_layer_start_index": 0}),
    (2, {"num_hidden_layers": 4, "moe_layer_interval": 2, "moe_layer_start_index": 0}),
    (3, {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_k": 3}),
    (4, {"moe_norm_min": 0.9, "rope_parameters": _common.LLAMA3}),
)

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"use_bias": True}, "use_bias"),
    ({"moe_use_aux_free": False}, "moe_use_aux_free"),
    ({"moe_layer_start_index": 3}, "no MoE layer"),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"ernie4_5_moe": (10, {"moe_k": 3})}
