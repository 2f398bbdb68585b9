"""DeepSeek-V2, DeepSeek-V2-Lite and their Coder models."""

from ef_jax.families import _common, _latent
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import RouterGroups, RouterSpec


def _router(fields: ConfigFields) -> RouterSpec:
    """Softmax over all experts; the best K, perhaps of the groups with the best experts, others at zero."""
    limited = fields.choice("topk_method", choices={"greedy": False, "group_limited_greedy": True})
    groups = None
    if limited:
        groups = RouterGroups(count=fields.integer("n_group"), keep=fields.integer("topk_group"), score="max", mask=0.0)
    return RouterSpec(groups=groups, scale=fields.number("routed_scaling_factor"), dtype="f32")


FAMILY = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    names=TensorNames(shared="shared_experts"),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    layers=_common.leading_dense_layers(),
    attention=_latent.latent_attention(precise=True),
    router=_router,
    experts=_common.experts("moe_intermediate_size", count=_latent.EXPERT_COUNT),
    shared=_latent.shared_experts,
    dense_width="intermediate_size",
    # transformers does not normalise, whatever the config says; the released models do not ask for it.
    must_be={"moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
    inert=_latent.INERT | {"n_group", "topk_group"},  # without effect where groups do not limit
)
