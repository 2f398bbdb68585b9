"""Qwen3-Next: delta nets and gated attention by interval or list, dense layers, partial rotation, a gated expert."""

from typing import Any

from tests.parity.families import _common, _delta_net

SIZES: dict[str, Any] = _delta_net.SIZES | {"intermediate_size": 24}

TOLERANCE = _delta_net.TOLERANCE

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, _delta_net.LONGER),
    (2, {"norm_topk_prob": False, "tie_word_embeddings": True, **_delta_net.EQUAL_HEADS}),
    (3, {"mlp_only_layers": [1], "attention_bias": True, "rope_parameters": _delta_net.PLAIN_ROPE}),
    (4, {"decoder_sparse_step": 2, "rope_parameters": _common.YARN, **_delta_net.ATTENTION_FIRST}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_next": (10, {"attention_bias": True, **_delta_net.ATTENTION_FIRST}),
}

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_act": "gelu"}, "hidden_act"),  # the convolution's too
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["linear_attention"]}, "layer_types"),
    ({"linear_num_value_heads": 3}, "value_heads"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
)
