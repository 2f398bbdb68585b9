"""Mixtral: router weights in float32, one window for all layers."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {"num_local_experts": 6}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {}),
    (2, {"sliding_window": 6, "tie_word_embeddings": True}),
    (3, {"head_dim": 12, "num_key_value_heads": 4, "rope_parameters": _common.YARN}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"mixtral": (13, {"sliding_window": 6})}
