"""gpt-oss: attention sinks, windows in every other layer, biases everywhere, experts in MXFP4."""

import dataclasses
from typing import Literal

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields, show
from ef_jax.families._names import TensorNames
from ef_jax.spec import AttentionSpec, ExpertSpec, LayerSpec, RopeSpec, RouterSpec

_KINDS = ("sliding_attention", "full_attention")

_grouped_query = _common.grouped_query(qkv_bias="attention_bias", out_bias="attention_bias", sinks=True)
_experts = _common.experts(
    "intermediate_size",
    count=("num_local_experts", "num_experts"),
    top_k=("num_experts_per_tok", "experts_per_token"),
)


def _layers(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
    kinds = _common.layer_kinds(fields, layers, _KINDS) or [_KINDS[i % 2] for i in range(layers)]
    window = fields.optional_integer("sliding_window")
    if window is None and _KINDS[0] in kinds:
        raise UnsupportedError(f"sliding_window must be positive where layers use {_KINDS[0]}, got null")
    return tuple(LayerSpec(ffn="moe", window=window if kind == _KINDS[0] else None) for kind in kinds)


def _attention(fields: ConfigFields, hidden: int) -> AttentionSpec:
    """Unlike other families, rope is stretched 32 times where the config does not speak of it."""
    attention = _grouped_query(fields, hidden)
    if not (fields.given("rope_parameters") or fields.given("rope_scaling")):
        theta, dim = attention.rope.theta, attention.head_dim
        rope = RopeSpec(kind="yarn", theta=theta, dim=dim, factor=32.0, original_max_position=4096, truncate=False)
        attention = dataclasses.replace(attention, rope=rope)
    original = attention.rope.original_max_position
    fields.must_be("initial_context_length", (None, original), f"it must be the original context, {original}")
    return attention


def _quantization(fields: ConfigFields) -> Literal["mxfp4"] | None:
    values = fields.mapping("quantization_config")
    if values is None:
        return None
    inner = ConfigFields(values, {}, prefix="quantization_config.")
    inner.must_be("quant_method", ("mxfp4",), "only mxfp4 is supported")
    inner.must_be("dequantize", (None, False), "MXFP4 weights are computed with as they are")
    kept = inner.raw("modules_to_not_convert") or []
    if not isinstance(kept, list | tuple) or any("experts" in str(name) for name in kept):
        raise UnsupportedError(
            f"quantization_config.modules_to_not_convert is {show(kept)}: all experts must be in MXFP4"
        )
    inner.close(())
    return "mxfp4"


def _read_experts(fields: ConfigFields) -> ExpertSpec:
    return dataclasses.replace(
        _experts(fields), activation="clamped_swiglu", bias=True, quantization=_quantization(fields)
    )


def _router(fields: ConfigFields) -> RouterSpec:
    return RouterSpec(order="topk_then_score", bias=True)


FAMILY = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    names=TensorNames(router="router", experts=("interleaved", "mxfp4")),
    defaults=_common.DEFAULTS
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "dtype": "bfloat16",  # as released, where config.json does not say it
    },
    layers=_layers,
    attention=_attention,
    router=_router,
    experts=_read_experts,
    norm="rms_f32",
    quantization=frozenset({"mxfp4"}),
    must_be={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
)
