"""MiniMax-M2: norms over all heads of queries and keys, part of each head rotated, a sigmoid router with a bias."""

from typing import Any

from tests.parity.families import _common

SIZES: dict[str, Any] = _common.SIZES | {
    "head_dim": 12,
    "num_local_experts": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    (2, {"tie_word_embeddings": True, "rope_parameters": _common.YARN}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"minimax_m2": (16, {})}
