"""The language model of Qwen3.5-MoE by itself: delta nets of four projections, rotary positions of three streams."""

from typing import Any

from tests.parity.families import _delta_net

SIZES: dict[str, Any] = _delta_net.SIZES

TOLERANCE = _delta_net.TOLERANCE

STREAMS: dict[str, Any] = _delta_net.PLAIN_ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"rope_parameters": STREAMS, "tie_word_embeddings": True}),
    (2, {"attention_bias": True, **_delta_net.ATTENTION_FIRST, **_delta_net.EQUAL_HEADS}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_5_moe_text": (10, {"rope_parameters": STREAMS}),
}

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"attn_output_gate": False}, "attn_output_gate"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
)
