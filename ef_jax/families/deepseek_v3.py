"""DeepSeek-V3 and DeepSeek-R1."""

from ef_jax.families import _common, _latent
from ef_jax.families._family import Family
from ef_jax.families._names import TensorNames

FAMILY = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    # After the last layer comes one that predicts a second token.
    names=TensorNames(shared="shared_experts", unused=(r"model\.layers\.{layers}\..*",)),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    layers=_common.leading_dense_layers(),
    attention=_latent.latent_attention(interleave="rope_interleave"),
    router=_latent.biased_sigmoid_router,
    experts=_common.experts("moe_intermediate_size", count=_latent.EXPERT_COUNT),
    shared=_latent.shared_experts,
    dense_width="intermediate_size",
    quantization=frozenset({"fp8"}),
    must_be={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    inert=_latent.INERT,
)
