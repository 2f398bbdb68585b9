"""gpt-oss in floats: sinks, biases, windows in every other layer, clamped SwiGLU. See test_mxfp4.py for MXFP4."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {"head_dim": 8, "num_local_experts": 6, "sliding_window": 6}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "num_experts_per_tok": 4}),
    (2, {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 16}),
    (3, {"rope_parameters": _common.YARN, "layer_types": ["full_attention"] * 3}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"gpt_oss": (17, {})}

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"swiglu_limit": 5.0}, "swiglu_limit"),
    ({"swiglu_alpha": 1.5}, "swiglu_alpha"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    (
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.mlp.experts"]}},
        "modules_to_not_convert",
    ),
    ({"quantization_config": {"quant_method": "mxfp4", "group_size": 16}}, "group_size"),
    ({"initial_context_length": 2048}, "initial_context_length"),
)
