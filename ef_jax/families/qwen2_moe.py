"""Qwen1.5-MoE and Qwen2-MoE."""

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.families.qwen3_moe import QWEN_DEFAULTS
from ef_jax.spec import SharedExpertSpec


def _windows(fields: ConfigFields, layers: int) -> _common.Windows:
    """Every other layer below `max_window_layers` slides, unless `layer_types` says otherwise."""
    window = fields.optional_integer("sliding_window", minimum=0)
    used = fields.flag("use_sliding_window")
    below = fields.integer("max_window_layers", minimum=0)
    sliding = [used and i % 2 == 0 and i < below for i in range(layers)]
    types = _common.layer_kinds(fields, layers, ("full_attention", "sliding_attention"))
    if types is not None:
        sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and not (used and window):
        raise UnsupportedError(
            f"layers use sliding_attention but use_sliding_window is {used} and sliding_window is {window}"
        )
    return tuple(window if slides else None for slides in sliding)


def _shared(fields: ConfigFields) -> SharedExpertSpec:
    return SharedExpertSpec(width=fields.integer("shared_expert_intermediate_size"), gated=True)


FAMILY = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    names=TensorNames(),
    defaults=QWEN_DEFAULTS
    | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    layers=_common.sparse_step_layers(_windows),
    attention=_common.grouped_query(qkv_bias="qkv_bias"),
    router=_common.softmax_router(normalize="norm_topk_prob"),
    experts=_common.experts("moe_intermediate_size"),
    shared=_shared,
    dense_width="intermediate_size",
    must_be={"attention_bias": False},
)
