"""Switch Transformers: an encoder and a decoder of T5's, with experts of limited capacity."""

from typing import Any

from ef_jax.errors import UnsupportedError
from ef_jax.families import _common
from ef_jax.families._family import Family
from ef_jax.families._fields import ConfigFields
from ef_jax.families._names import TensorNames
from ef_jax.spec import ExpertSpec, LayerSpec, RelativeAttentionSpec, RouterSpec

_TRAINED = 512
"""Tokens of a prompt, and of a text, in training. Positions are relative, so that nothing in a config bounds them."""


def _layers(fields: ConfigFields, encoder_layers: int) -> tuple[LayerSpec, ...]:
    decoder_layers = fields.optional_integer("num_decoder_layers") or encoder_layers
    decoder = _sparse(fields, "decoder", decoder_layers)
    if not any(decoder):
        raise UnsupportedError("num_sparse_decoder_layers leaves the decoder without experts, which is not supported")
    encoder = _sparse(fields, "encoder", encoder_layers)
    return (
        *(LayerSpec(ffn="moe" if sparse else "dense") for sparse in decoder),
        *(LayerSpec(ffn="moe" if sparse else "dense", stack="encoder") for sparse in encoder),
    )


def _sparse(fields: ConfigFields, stack: str, layers: int) -> list[bool]:
    """Which layers of a stack have experts: every so many of them, from the second."""
    wanted = fields.integer(f"num_sparse_{stack}_layers", minimum=0)
    step = fields.optional_integer(f"{stack}_sparse_step", minimum=0)
    if step is None:
        step = layers // wanted if wanted else layers
    return [step == 1 or (step > 0 and layer % step == 1) for layer in range(layers)]


def _attention(fields: ConfigFields, hidden: int) -> RelativeAttentionSpec:
    return RelativeAttentionSpec(
        heads=fields.integer("num_heads", "num_attention_heads"),
        head_dim=fields.integer("d_kv"),
        buckets=fields.integer("relative_attention_num_buckets"),
        max_distance=fields.integer("relative_attention_max_distance"),
    )


def _router(fields: ConfigFields) -> RouterSpec:
    return RouterSpec(
        bias=fields.flag("router_bias"),
        dtype="f32_cast_back",
        rounded_choice=True,
        capacity=fields.integer("expert_capacity"),
    )


def _experts(fields: ConfigFields) -> ExpertSpec:
    return ExpertSpec(
        count=fields.integer("num_experts"),
        top_k=1,
        width=fields.integer("d_ff"),
        activation=fields.choice("dense_act_fn", choices=_common.ACTIVATIONS),
        gated=False,
    )


def _more(fields: ConfigFields) -> dict[str, Any]:
    start = fields.optional_integer("decoder_start_token_id", minimum=0)
    if start is None:
        start = fields.optional_integer("pad_token_id", minimum=0)
    if start is None:
        raise UnsupportedError("decoder_start_token_id is not given, nor is pad_token_id, which stands for it")
    # Where embeddings are not tied, encoder and decoder have their own; the spec refuses that.
    return {"decoder_start": start, "logits_divisor": fields.integer("d_model", "hidden_size") ** 0.5}


FAMILY = Family(
    model_type="switch_transformers",
    architectures=("SwitchTransformersForConditionalGeneration",),
    names=TensorNames(
        # Copies of the embedding, which files made from pickled releases may hold.
        unused=(r"(en|de)coder\.embed_tokens\.weight",),
        experts=("by_stack",),
    ),
    defaults={
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "expert_capacity": 64,
        "num_layers": 12,
        "num_sparse_encoder_layers": 3,
        "num_decoder_layers": 12,
        "num_sparse_decoder_layers": 3,
        "num_heads": 12,
        "num_experts": 8,
        "router_bias": False,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "max_position_embeddings": 2 * _TRAINED,
        "layer_norm_epsilon": 1e-6,
        "dense_act_fn": "relu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
    hidden=("d_model", "hidden_size"),
    layer_count=("num_layers", "num_hidden_layers"),
    layers=_layers,
    attention=_attention,
    router=_router,
    experts=_experts,
    dense_width="d_ff",
    more=_more,
    norm_eps="layer_norm_epsilon",
    must_be={
        "feed_forward_proj": "relu",
        "is_encoder_decoder": True,
        "is_gated_act": False,
        "router_dtype": "float32",
        "router_type": "tokens_masked",
    },
    inert=frozenset(
        {
            "add_router_probs",
            "dropout_rate",
            "initializer_factor",
            "n_positions",
            "output_past",
            "router_ignore_padding_tokens",
            "router_jitter_noise",
            "router_z_loss_coef",
        }
    ),
)
