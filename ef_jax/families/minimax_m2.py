"""MiniMax-M2."""

import dataclasses

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields, show
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec, LayerSpec, RouterNormalize, RouterSpec

_read_attention = _common.grouped_query(qk_norm="full", rotary="partial_rotary_factor")


def _layers(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
    """`attn_type_list` has a 1 for each layer of plain attention; its relatives had others."""
    types = fields.raw("attn_type_list")
    if types is not None and types != [1] * layers:
        raise UnsupportedError(f"attn_type_list must be {layers} ones, got {show(types)}")
    return _common.full_layers(fields, layers)


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    """The released config has the width of what is rotated, transformers 5 its share of a head."""
    attention = _read_attention(fields, hidden)
    width = fields.optional_integer("rotary_dim")
    if width is None or width == attention.rope.dim:
        return attention
    if attention.rope.dim != attention.head_dim:
        raise UnsupportedError(
            f"rotary_dim is {width}, but partial_rotary_factor makes it {attention.rope.dim}: the two must agree"
        )
    return dataclasses.replace(attention, rope=dataclasses.replace(attention.rope, dim=width))


def _router(fields: ConfigFields) -> RouterSpec:
    """Sigmoid scores with a bias for selection, normalised; matrix and logits are float32, as released."""
    return RouterSpec(
        score="sigmoid", select_bias=True, normalize=RouterNormalize(), dtype="f32", weight_dtype="float32"
    )


FAMILY = Family(
    model_type="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    names=TensorNames(
        moe="block_sparse_moe",
        select_bias="block_sparse_moe.e_score_correction_bias",
        gate="w1",
        up="w3",
        down="w2",
        experts=("per_expert",),
    ),
    defaults=_common.DEFAULTS
    | {
        "dtype": "bfloat16",  # the released config, of FP8 weights, has none
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5000000.0,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    layers=_layers,
    attention=_attention,
    router=_router,
    experts=_common.experts("intermediate_size", count=("num_local_experts", "num_experts")),
    quantization=frozenset({"fp8"}),
    must_be={
        "attention_bias": False,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
    inert=frozenset(
        {
            "layernorm_linear_attention_beta",  # of layers of a kind that this model does not have
            "mlp_intermediate_size",
            "mtp_transformer_layers",
            "num_mtp_modules",
            "router_jitter_noise",
            "shared_moe_mode",
            "swa_rope_theta",
            "use_mtp",
        }
    ),
)
