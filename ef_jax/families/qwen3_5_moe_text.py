"""The language model of Qwen3.5-MoE by itself."""

import dataclasses

from ef_jax.families import qwen3_5_moe

FAMILY = dataclasses.replace(
    qwen3_5_moe.FAMILY,
    model_type="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    names=dataclasses.replace(
        qwen3_5_moe.FAMILY.names, model="model", experts=("per_expert", "fused"), unused=(r"mtp\..*",)
    ),
    text=None,
    outer=frozenset(),
)
