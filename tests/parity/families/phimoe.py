"""Phi-3.5-MoE: biases on and off, jitter that leaves in few or many experts, longrope on either side."""

from typing import Any

from tests.parity.families import _common

BIASES: dict[str, Any] = {"attention_bias": True, "lm_head_bias": True}

SHORT: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 3.0, 8.0, 20.0],
    "short_mscale": 1.1,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 96,
}

# transformers 5.23 never takes the long factors; so they are the short ones here.
LONG: dict[str, Any] = SHORT | {"long_factor": SHORT["short_factor"], "original_max_position_embeddings": 16}

SIZES: dict[str, Any] = _common.SIZES | {"num_local_experts": 6, "router_jitter_noise": 0.1}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, BIASES),
    (2, BIASES | {"router_jitter_noise": 0.01, "rope_parameters": SHORT}),
    (3, {"router_jitter_noise": 0.6, "rope_parameters": LONG, "lm_head_bias": True}),
    (4, {"attention_bias": True, "sliding_window": 6, "tie_word_embeddings": True}),
)

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"rope_parameters": _common.YARN}, "rope_type"),
    ({"rope_parameters": SHORT | {"long_mscale": None}}, "rope_parameters.long_mscale"),
    ({"rope_parameters": SHORT | {"long_factor": [1.0, -2.0]}}, "rope_parameters.long_factor"),
    ({"rope_parameters": SHORT | {"short_factor": [1.0]}}, "short_factors"),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"phimoe": (10, BIASES | {"rope_parameters": SHORT})}
