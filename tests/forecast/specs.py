"""Specs to forecast for: a small one, and released models."""

import json
from typing import Any

from ef_jax.families import spec_from_config
from ef_jax.forecast import arithmetic_plan
from ef_jax.memory.plan import MemoryPlan, MemoryRequest
from ef_jax.spec import ModelSpec
from tests.released import read_config
from tests.weights.synthetic import CONFIGS

SMALL = spec_from_config(CONFIGS["qwen2_moe"])


def released(name: str) -> ModelSpec:
    """The spec of a released model."""
    return spec_from_config(read_config(name))


def small_with(**changes: Any) -> ModelSpec:
    """The small spec with other fields of its configuration."""
    return spec_from_config(json.loads(json.dumps(CONFIGS["qwen2_moe"] | changes)))


def plan_of(
    spec: ModelSpec,
    share: float,
    *,
    batch: int = 1,
    platform: str = "gpu",
    context: int = 64,
    host_memory: int | None = None,
) -> MemoryPlan:
    """A plan with slots for a share of the experts."""
    request = MemoryRequest(
        expert_fraction=share, batch=batch, context=context, chunk=32, host_memory=host_memory
    )  # fmt: skip
    return arithmetic_plan(spec, request, "cpu" if platform == "cpu" else "gpu")
