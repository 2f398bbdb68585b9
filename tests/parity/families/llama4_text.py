"""Llama 4: chunks shorter than the prompt, layers without rotation, temperatures that count, dense layers between."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "num_hidden_layers": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 40,
    "head_dim": 8,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.3,
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attn_temperature_tuning": False}),
    (2, {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "tie_word_embeddings": True, "attention_bias": True}),
    (3, {"moe_layers": [1, 2], "no_rope_layers": [0, 1, 1, 0], "rope_parameters": _common.LLAMA3}),
    (4, {"num_experts_per_tok": 2, "attention_chunk_size": 64}),
    (
        5,
        {
            "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
            "rope_parameters": _common.LLAMA3 | {"high_freq_factor": 1.0},
        },
    ),
)

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"attention_chunk_size": None}, "attention_chunk_size"),
    ({"no_rope_layers": [1]}, "no_rope_layers"),
    ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning"),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "llama4_text": (10, {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2})
}
