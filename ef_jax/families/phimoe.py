"""Phi-3.5-MoE: LayerNorm, biases everywhere, a sparse mixer for a router, longrope with factors of its own.

Beyond the original context transformers 5.23 takes the long attention factor and still the short frequencies; here
as in the released model the long ones come with it.
"""

from typing import Any

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec, RouterSpec

_read_attention = _common.grouped_query(qkv_bias="attention_bias", out_bias="attention_bias", mscales=True)


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    """transformers takes the attention factor of every kind of rope but the plain one from `short_mscale`."""
    attention = _read_attention(fields, hidden)
    if attention.rope.kind not in ("default", "longrope"):
        raise UnsupportedError(f"rope_type must be default or longrope in this family, got {attention.rope.kind!r}")
    return attention


def _router(fields: ConfigFields) -> RouterSpec:
    if (chosen := fields.integer("num_experts_per_tok")) != 2:
        raise UnsupportedError(f"num_experts_per_tok must be 2, the choices of a sparse mixer, got {chosen}")
    return RouterSpec(sparse_mixer=fields.number("router_jitter_noise"))


def _more(fields: ConfigFields) -> dict[str, Any]:
    return {"head_bias": fields.flag("lm_head_bias")}


FAMILY = Family(
    model_type="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    names=TensorNames(moe="block_sparse_moe", gate="w1", up="w3", down="w2", experts=("per_expert",)),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "lm_head_bias": False,
    },
    layers=_common.same_window_layers,
    attention=_attention,
    router=_router,
    experts=_common.experts("intermediate_size", count=("num_local_experts",)),
    norm="layer",
    more=_more,
    inert=frozenset({"hidden_dropout", "input_jitter_noise"}),  # of training
)
