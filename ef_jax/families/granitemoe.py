"""Granite MoE: factors on embeddings, scores, residuals and logits; experts stacked on disk."""

from typing import Any

from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import RouterSpec


def _router(fields: ConfigFields) -> RouterSpec:
    return RouterSpec(order="topk_then_score")


def _factors(fields: ConfigFields) -> dict[str, Any]:
    return {
        "embed_scale": fields.number("embedding_multiplier"),
        "residual_scale": fields.number("residual_multiplier"),
        "logits_divisor": fields.number("logits_scaling"),
    }


FAMILY = Family(
    model_type="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    names=TensorNames(moe="block_sparse_moe", router="router.layer", experts=("stacked",)),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    layers=_common.full_layers,
    attention=_common.grouped_query(qkv_bias="attention_bias", out_bias="attention_bias", scale="attention_multiplier"),
    router=_router,
    experts=_common.experts("intermediate_size", count=("num_local_experts",)),
    more=_factors,
)
