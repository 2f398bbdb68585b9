"""The released configurations in tests/fixtures/configs, and what their publishers say of their size."""

import json
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).parent / "fixtures" / "configs"


class Published(NamedTuple):
    """Parameters as published, in billions; SOURCES.md beside the configurations says where."""

    total: float
    active: float


RELEASED: dict[str, Published] = {
    "deepseek-v2": Published(236, 21),
    "deepseek-v2-lite": Published(15.7, 2.4),
    "deepseek-v3": Published(671, 37),
    "ernie-4.5-21b-a3b": Published(21.83, 3),
    "ernie-4.5-300b-a47b": Published(300, 47),
    "glm-4.5": Published(355, 32),
    "glm-4.5-air": Published(106, 12),
    "gpt-oss-20b": Published(20.91, 3.61),
    "gpt-oss-120b": Published(116.83, 5.13),
    "granite-3.1-3b-a800m": Published(3.3, 0.8),
    "kimi-k2-instruct": Published(1026.4, 32),
    "llama-4-maverick": Published(400, 17),
    "llama-4-scout": Published(107.77, 17),
    "minimax-m2": Published(230, 10),
    "mixtral-8x7b": Published(46.7, 12.9),
    "mixtral-8x22b": Published(141, 39),
    "olmoe-1b-7b": Published(6.92, 1.3),
    "phi-3.5-moe": Published(41.9, 6.6),
    "qwen1.5-moe-a2.7b": Published(14.3, 2.7),
    "qwen2-57b-a14b": Published(57.41, 14),
    "qwen3-30b-a3b": Published(30.5, 3.3),
    "qwen3-235b-a22b": Published(235, 22),
    "qwen3-next-80b-a3b": Published(80, 3),
    "qwen3.5-35b-a3b": Published(34.66, 3),
    "qwen3.6-35b-a3b": Published(34.66, 3),
    "switch-base-8": Published(0.62, 0.22),
    "switch-base-128": Published(7.4, 0.22),
}


def read_config(name: str) -> dict[str, Any]:
    """The configuration as its publisher wrote it."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config
