"""Granite MoE: every factor on and off, attention with and without biases, tied embeddings."""

from typing import Any

from tests.parity.families import _common

FACTORS: dict[str, Any] = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.25,
    "logits_scaling": 1.5,
}

SIZES: dict[str, Any] = _common.SIZES | {"num_local_experts": 6, "attention_multiplier": 0.35}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, FACTORS),
    (2, FACTORS | {"tie_word_embeddings": True, "attention_bias": True}),
    (3, {"rope_parameters": _common.LINEAR, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    (4, {"residual_multiplier": 0.22, "hidden_act": "gelu", "num_experts_per_tok": 6}),
)

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"residual_multiplier": 0.0}, "residual_multiplier"),
    ({"sliding_window": 8}, "sliding_window"),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"granitemoe": (10, FACTORS | {"tie_word_embeddings": True})}
