"""ERNIE 4.5 MoE: rotated neighbours, a router in float32 with a bias for selection, plain shared experts."""

from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import LayerSpec, RouterNormalize, RouterSpec, SharedExpertSpec


def _layers(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
    """Experts every so many layers, from one layer to another; -1: to the last."""
    first = fields.integer("moe_layer_start_index", minimum=0)
    last = fields.integer("moe_layer_end_index", minimum=-1)
    step = fields.integer("moe_layer_interval")
    within = range(first, layers if last == -1 else last + 1)
    return tuple(LayerSpec(ffn="moe" if i in within and (i + 1) % step == 0 else "dense") for i in range(layers))


def _router(fields: ConfigFields) -> RouterSpec:
    return RouterSpec(
        select_bias=True,
        normalize=RouterNormalize(minimum=fields.number("moe_norm_min")),
        dtype="f32_cast_back",
        weight_dtype="float32",
    )


def _shared(fields: ConfigFields) -> SharedExpertSpec | None:
    count = fields.integer("moe_num_shared_experts", minimum=0)
    width = fields.integer("moe_intermediate_size")
    return SharedExpertSpec(width=count * width, gated=False) if count else None


FAMILY = Family(
    model_type="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    names=TensorNames(
        shared="shared_experts",
        select_bias="mlp.moe_statics.e_score_correction_bias",
        select_bias_shape=(1,),
        unused=(r"model\.mtp_.*",),
    ),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 103424,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    },
    layers=_layers,
    attention=_common.grouped_query(interleaved=True, precise=True),
    router=_router,
    experts=_common.experts(
        "moe_intermediate_size",
        count=("moe_num_experts", "num_experts", "num_local_experts"),
        top_k=("moe_k", "num_experts_per_tok"),
    ),
    shared=_shared,
    dense_width="intermediate_size",
    must_be={"use_bias": False, "moe_gate": "topk", "moe_use_aux_free": True},
    inert=frozenset({"moe_capacity", "num_nextn_predict_layers"}),  # of training, and of tensors that are not used
)
