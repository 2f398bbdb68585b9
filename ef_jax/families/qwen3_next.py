"""Qwen3-Next: gated DeltaNet in most layers, gated attention in every fourth."""

import dataclasses
from collections.abc import Callable

from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import DeltaNetSpec, LayerSpec, SharedExpertSpec

DEFAULTS: dict[str, object] = _common.DEFAULTS | {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

# The convolution's activation is the experts'; only this one is implemented for it.
_ACTIVATIONS = {name: kind for name, kind in _common.ACTIVATIONS.items() if kind == "silu"}

attention = _common.grouped_query(
    qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head", rotary="partial_rotary_factor", gated=True
)
experts = _common.experts("moe_intermediate_size", activations=_ACTIVATIONS)


def linear_layers(fields: ConfigFields, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Delta nets where `layer_types` says so, or in all but every `full_attention_interval`th layer."""
    interval = fields.integer("full_attention_interval")
    types = _common.layer_kinds(fields, len(layers), ("full_attention", "linear_attention"))
    if types is None:
        types = tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(layers)))
    return tuple(
        dataclasses.replace(layer, mixer="delta_net" if kind == "linear_attention" else "attention")
        for layer, kind in zip(layers, types, strict=True)
    )


def delta_net(*, fused: bool) -> Callable[[ConfigFields], DeltaNetSpec]:
    """Reader of the delta nets; `fused` as `DeltaNetSpec` has it."""

    def read(fields: ConfigFields) -> DeltaNetSpec:
        return DeltaNetSpec(
            key_heads=fields.integer("linear_num_key_heads"),
            value_heads=fields.integer("linear_num_value_heads"),
            key_dim=fields.integer("linear_key_head_dim"),
            value_dim=fields.integer("linear_value_head_dim"),
            conv_width=fields.integer("linear_conv_kernel_dim", minimum=2),
            fused=fused,
        )

    return read


def shared(fields: ConfigFields) -> SharedExpertSpec:
    """The shared expert, with its gate."""
    return SharedExpertSpec(width=fields.integer("shared_expert_intermediate_size"), gated=True)


_sparse_layers = _common.sparse_step_layers(lambda fields, layers: (None,) * layers)

FAMILY = Family(
    model_type="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    names=TensorNames(unused=(r"mtp\..*",)),
    defaults=DEFAULTS
    | {
        "vocab_size": 151936,
        "num_hidden_layers": 48,
        "intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    layers=lambda fields, count: linear_layers(fields, _sparse_layers(fields, count)),
    attention=attention,
    delta_net=delta_net(fused=True),
    router=_common.softmax_router(normalize="norm_topk_prob"),
    experts=experts,
    shared=shared,
    dense_width="intermediate_size",
    norm="rms_offset",
    must_be={"use_sliding_window": False},
)
