"""OLMoE: queries and keys normed over all heads, clipped projections."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {"num_experts": 6}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {}),
    (2, {"clip_qkv": 0.7, "norm_topk_prob": True, "rope_parameters": _common.LINEAR}),
    (3, {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "olmoe": (14, {"clip_qkv": 0.7, "norm_topk_prob": True, "tie_word_embeddings": True}),
}
