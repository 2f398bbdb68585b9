"""Kimi-K2: DeepSeek-V3 under a name of its own, with one group of experts."""

from typing import Any

from tests.parity.families import _common, deepseek_v3

CONFIG_TYPE = "deepseek_v3"

SIZES: dict[str, Any] = deepseek_v3.SIZES | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.8}

LIVE: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {}),
    (1, {"rope_parameters": _common.YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}),
)

RECORDED: dict[str, tuple[int, dict[str, Any]]] = {"kimi_k2": (14, {})}
