"""Mixtral."""

from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._names import TensorNames

FAMILY = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    names=TensorNames(moe="block_sparse_moe", gate="w1", up="w3", down="w2"),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_experts": 8,
    },
    layers=_common.same_window_layers,
    attention=_common.grouped_query(),
    router=_common.softmax_router(dtype="model_keep_f32"),
    experts=_common.experts("intermediate_size"),
    must_be={"attention_bias": False},
    inert=frozenset({"router_jitter_noise"}),
)
