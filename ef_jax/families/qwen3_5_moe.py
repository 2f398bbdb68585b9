"""Qwen3.5-MoE and Qwen3.6-MoE: Qwen3-Next's layers, released with a vision tower, which is not run.

Rotary positions come in three streams, time, height and width, whose frequencies interleave (`mrope_section`). Of text
all three are the token's position, so that it is plain rope.
"""

from ef_jax.families import _common, qwen3_next
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import LayerSpec


def _layers(fields: ConfigFields, count: int) -> tuple[LayerSpec, ...]:
    return qwen3_next.linear_layers(fields, (LayerSpec(ffn="moe"),) * count)


FAMILY = Family(
    model_type="qwen3_5_moe",
    architectures=("Qwen3_5MoeForConditionalGeneration",),
    names=TensorNames(
        model="model.language_model",
        experts=("fused", "per_expert"),
        unused=(r"mtp\..*", r"model\.visual\..*"),
    ),
    defaults=qwen3_next.DEFAULTS
    | {"vocab_size": 248320, "num_hidden_layers": 40, "num_experts_per_tok": 8, "num_experts": 256},
    layers=_layers,
    attention=qwen3_next.attention,
    delta_net=qwen3_next.delta_net(fused=False),
    router=_common.softmax_router(),
    experts=qwen3_next.experts,
    shared=qwen3_next.shared,
    norm="rms_offset",
    text="text_config",
    outer=frozenset(
        {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
    ),
    must_be={"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": []},
    inert=frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
)
