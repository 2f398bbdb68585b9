"""GLM-4.5, GLM-4.6 and GLM-4.7."""

import dataclasses

from ef_jax.families import _common, _latent
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec

_read_attention = _common.grouped_query(qkv_bias="attention_bias", rotary="partial_rotary_factor")


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    """GLM-4.5 norms queries and keys, GLM-4.5-Air does not."""
    normed = fields.flag("use_qk_norm")
    return dataclasses.replace(_read_attention(fields, hidden), qk_norm="head" if normed else None)


FAMILY = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    names=TensorNames(shared="shared_experts", unused=(r"model\.layers\.{layers}\..*",)),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    layers=_common.leading_dense_layers(),
    attention=_attention,
    router=_latent.biased_sigmoid_router,
    experts=_common.experts("moe_intermediate_size", count=_latent.EXPERT_COUNT),
    shared=_latent.shared_experts,
    dense_width="intermediate_size",
    inert=frozenset({"num_mtp_layers", "num_nextn_predict_layers"}),
)
