"""Llama 4, its language model: experts read inputs scaled by the router, layers with and without rotation.

Layers with rotation see their own chunk of the context and norm queries and keys after rotating them; those without
see everything, with queries scaled by position.
"""

import dataclasses

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields, show
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec, ExpertSpec, LayerSpec, RouterSpec, SharedExpertSpec

_read_attention = _common.grouped_query(
    qkv_bias="attention_bias", out_bias="attention_bias", interleaved=True, precise=True
)

_read_experts = _common.experts("intermediate_size", count=("num_local_experts",))


def _layers(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
    step = fields.integer("interleave_moe_layer_step")
    given = fields.raw("moe_layers") is not None
    moe = fields.integers("moe_layers", below=layers) if given else range(step - 1, layers, step)
    interval = fields.integer("no_rope_layer_interval")
    # Despite its name, the field has 1 for the layers that rotate.
    rope = fields.integers("no_rope_layers", below=2) or tuple(int((i + 1) % interval != 0) for i in range(layers))
    if len(rope) < layers:
        raise UnsupportedError(f"no_rope_layers must have {layers} entries, one a layer, got {show(list(rope))}")
    kinds = _common.layer_kinds(fields, layers, ("full_attention", "chunked_attention"))
    chunked = [kind == "chunked_attention" for kind in kinds] if kinds else [bool(one) for one in rope]
    chunk = fields.optional_integer("attention_chunk_size")
    if any(chunked[:layers]) and chunk is None:
        raise UnsupportedError("attention_chunk_size must be an integer where layers use chunked_attention, got None")
    return tuple(
        LayerSpec(ffn="moe" if i in moe else "dense", chunk=chunk if chunked[i] else None, rope=bool(rope[i]))
        for i in range(layers)
    )


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    floor, scale = fields.integer("floor_scale"), fields.number("attn_scale")
    return dataclasses.replace(
        _read_attention(fields, hidden),
        qk_norm="l2" if fields.flag("use_qk_norm") else None,
        temperature=(float(floor), scale) if _tuned(fields) else None,
    )


def _tuned(fields: ConfigFields) -> bool:
    """Some released configs have a number for true."""
    value = fields.raw("attn_temperature_tuning")
    if isinstance(value, bool | int):
        return bool(value)
    raise UnsupportedError(f"attn_temperature_tuning must be true or false, got {show(value)}")


def _router(fields: ConfigFields) -> RouterSpec:
    return RouterSpec(order="topk_then_score", score="sigmoid")


def _experts(fields: ConfigFields) -> ExpertSpec:
    return dataclasses.replace(_read_experts(fields), scale_input=True)


def _shared(fields: ConfigFields) -> SharedExpertSpec:
    return SharedExpertSpec(width=fields.integer("intermediate_size"), gated=False)


FAMILY = Family(
    model_type="llama4",
    architectures=("Llama4ForConditionalGeneration",),
    names=TensorNames(
        model="language_model.model",
        head="language_model.lm_head",
        moe="feed_forward",
        dense="feed_forward",
        router="router",
        shared="shared_expert",
        experts=("transposed",),
        unused=(r"vision_model\..*", r"multi_modal_projector\..*"),
    ),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    layers=_layers,
    attention=_attention,
    router=_router,
    experts=_experts,
    shared=_shared,
    dense_width="intermediate_size_mlp",
    text="text_config",
    outer=frozenset({"vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "processor_class"}),
    inert=frozenset({"router_jitter_noise", "for_llm_compressor", "cache_implementation"}),
)
