"""Qwen3-MoE."""

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames

QWEN_DEFAULTS: dict[str, object] = _common.DEFAULTS | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}


def _windows(fields: ConfigFields, layers: int) -> _common.Windows:
    """Every layer slides, or none."""
    window = fields.optional_integer("sliding_window", minimum=0)
    if not fields.flag("use_sliding_window") or window is None:
        return (None,) * layers
    if window == 0:
        raise UnsupportedError("sliding_window must be positive where use_sliding_window is true, got 0")
    return (window,) * layers


FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    names=TensorNames(),
    defaults=QWEN_DEFAULTS
    | {
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    layers=_common.sparse_step_layers(_windows),
    attention=_common.grouped_query(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head"),
    router=_common.softmax_router(normalize="norm_topk_prob"),
    experts=_common.experts("moe_intermediate_size"),
    dense_width="intermediate_size",
    quantization=frozenset({"fp8"}),
    must_be={"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
    inert=frozenset({"max_window_layers"}),  # read by transformers 4 only; 5 slides every layer or none
)
