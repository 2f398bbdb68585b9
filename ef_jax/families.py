"""Model families: from a Hugging Face `config.json` to a `ModelSpec`.

The fields, their defaults and their meaning are those of transformers 5.23 (`models/<model_type>/`); the spellings of
transformers 4 are read too. Every field is read, or must have the one value that is implemented, or is known to do
nothing at inference. Anything else raises: no field is silently ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from ef_jax._config_fields import ConfigFields, show
from ef_jax._config_rope import rope_from_config
from ef_jax.errors import UnsupportedError
from ef_jax.spec import (
    Activation,
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    ModelSpec,
    RouterNormalize,
    RouterSpec,
    SharedExpertSpec,
)

Windows = tuple[int | None, ...]


def _no_windows(fields: ConfigFields, layers: int) -> Windows:
    fields.must_be("sliding_window", (None,), "this family has no sliding window; it must be null")
    return (None,) * layers


def _same_window(fields: ConfigFields, layers: int) -> Windows:
    return (fields.optional_integer("sliding_window"),) * layers


def _switched_window(fields: ConfigFields, layers: int) -> Windows:
    window = fields.optional_integer("sliding_window", minimum=0)
    if not fields.flag("use_sliding_window") or window is None:
        return (None,) * layers
    if window == 0:
        raise UnsupportedError("sliding_window must be positive where use_sliding_window is true, got 0")
    return (window,) * layers


def _alternating_windows(fields: ConfigFields, layers: int) -> Windows:
    """Qwen2-MoE: every other layer below `max_window_layers` slides, unless `layer_types` says otherwise."""
    window = fields.optional_integer("sliding_window", minimum=0)
    used = fields.flag("use_sliding_window")
    below = fields.integer("max_window_layers", minimum=0)
    sliding = [used and i % 2 == 0 and i < below for i in range(layers)]
    types = fields.raw("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list | tuple) or len(types) != layers or any(kind not in kinds for kind in types):
            raise UnsupportedError(f"layer_types must list {layers} of {', '.join(kinds)}, got {show(types)}")
        sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and not (used and window):
        raise UnsupportedError(
            f"layers use sliding_attention but use_sliding_window is {used} and sliding_window is {window}"
        )
    return tuple(window if slides else None for slides in sliding)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Which config field means what; a None name: the family has no such thing."""

    architecture: str
    defaults: Mapping[str, object]
    expert_width: str
    windows: Callable[[ConfigFields, int], Windows]
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: str | None = None
    out_bias: str | None = None
    normalize: str | None = None  # None: always normalised
    router_dtype: Literal["model", "model_keep_f32"] = "model"
    shared_width: str | None = None
    dense_width: str | None = None  # such families choose dense layers by mlp_only_layers and decoder_sparse_step
    must_be: Mapping[str, object] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()


_DEFAULTS: dict[str, object] = {
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": False,
}

_QWEN_DEFAULTS: dict[str, object] = _DEFAULTS | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}

_FAMILIES: dict[str, _Family] = {
    "qwen3_moe": _Family(
        architecture="Qwen3MoeForCausalLM",
        defaults=_QWEN_DEFAULTS
        | {
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        expert_width="moe_intermediate_size",
        windows=_switched_window,
        qk_norm="head",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        normalize="norm_topk_prob",
        dense_width="intermediate_size",
        must_be={"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        inert=frozenset({"max_window_layers"}),  # read by transformers 4 only; 5 slides every layer or none
    ),
    "qwen2_moe": _Family(
        architecture="Qwen2MoeForCausalLM",
        defaults=_QWEN_DEFAULTS
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
        expert_width="moe_intermediate_size",
        windows=_alternating_windows,
        qkv_bias="qkv_bias",
        normalize="norm_topk_prob",
        shared_width="shared_expert_intermediate_size",
        dense_width="intermediate_size",
        must_be={"attention_bias": False},
    ),
    "mixtral": _Family(
        architecture="MixtralForCausalLM",
        defaults=_DEFAULTS
        | {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_experts_per_tok": 2,
            "num_experts": 8,
        },
        expert_width="intermediate_size",
        windows=_same_window,
        router_dtype="model_keep_f32",
        must_be={"attention_bias": False},
        inert=frozenset({"router_jitter_noise"}),
    ),
    "olmoe": _Family(
        architecture="OlmoeForCausalLM",
        defaults=_DEFAULTS
        | {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "num_experts_per_tok": 8,
            "num_experts": 64,
        },
        expert_width="intermediate_size",
        windows=_no_windows,
        qk_norm="full",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        normalize="norm_topk_prob",
    ),
}

_ACTIVATIONS: dict[str | None, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_DTYPES: dict[str | None, Literal["bfloat16", "float16", "float32"]] = {
    None: "float32",  # what torch makes of a config without one
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
}

_MUST_BE: dict[str, object] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": None,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}

# Training, bookkeeping and the generation defaults that transformers 4 kept here (5 drops them, and so do we).
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path
    attention_dropout attn_implementation begin_suppress_tokens bad_words_ids chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length
    model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905 (as a list it fills a page)
)

_MAX_LAYERS = 10_000


def spec_from_config(config: Mapping[str, object]) -> ModelSpec:
    """The model that a Hugging Face `config.json` describes.

    Args:
      config: the parsed JSON object.

    Raises:
      UnsupportedError: an unknown architecture, or a field that is unknown, of the wrong type, out of range, at odds
        with another, or asks for something that is not implemented; the message names field and value.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedError(f"config.json must hold an object, got {show(config)}")
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise UnsupportedError(f"model_type {show(model_type)} is not supported; supported: {', '.join(_FAMILIES)}")
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            raise UnsupportedError(
                f"{name} is {show(config[name])}: quantized checkpoints are not supported; use the original weights"
            )
    fields = ConfigFields(config, family.defaults)
    architecture = family.architecture
    fields.must_be("architectures", (None, [], [architecture]), f"only {architecture} is supported for {model_type}")
    for name, value in (_MUST_BE | dict(family.must_be)).items():
        fields.must_be(name, (None, value), f"only {value!r} is supported for {model_type}")

    hidden, layers = fields.integer("hidden_size"), _layers(fields, family)
    spec = ModelSpec(
        family=model_type,
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        max_position=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.choice("dtype", "torch_dtype", choices=_DTYPES),
        layers=layers,
        attention=_attention(fields, family, hidden),
        router=RouterSpec(
            normalize=RouterNormalize() if family.normalize is None or fields.flag(family.normalize) else None,
            dtype=family.router_dtype,
        ),
        experts=ExpertSpec(
            count=fields.integer("num_experts", "num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            width=fields.integer(family.expert_width),
            activation=fields.choice("hidden_act", choices=_ACTIVATIONS),
        ),
        shared=SharedExpertSpec(width=fields.integer(family.shared_width), gated=True) if family.shared_width else None,
        dense_width=_dense_width(fields, family, layers),
        bos_id=fields.optional_integer("bos_token_id", minimum=0),
        eos_ids=fields.integers("eos_token_id", below=2**31),
    )
    fields.close({"quantization_config", "compression_config"} | _INERT | family.inert)
    return spec


def _layers(fields: ConfigFields, family: _Family) -> tuple[LayerSpec, ...]:
    count = fields.integer("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise UnsupportedError(f"num_hidden_layers must be at most {_MAX_LAYERS}, got {count}")
    dense: set[int] = set()
    if family.dense_width is not None:
        step = fields.integer("decoder_sparse_step")
        dense = set(fields.integers("mlp_only_layers", below=count))
        dense |= {i for i in range(count) if (i + 1) % step}
    windows = family.windows(fields, count)
    return tuple(LayerSpec(ffn="dense" if i in dense else "moe", window=windows[i]) for i in range(count))


def _dense_width(fields: ConfigFields, family: _Family, layers: tuple[LayerSpec, ...]) -> int | None:
    if family.dense_width is None:
        return None
    width = fields.integer(family.dense_width)
    return width if any(layer.ffn == "dense" for layer in layers) else None


def _attention(fields: ConfigFields, family: _Family, hidden: int) -> AttentionSpec:
    heads = fields.integer("num_attention_heads")
    # Absent or null means one key/value head a query head in the families whose config class has no default.
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    head_dim = fields.optional_integer("head_dim") or hidden // heads
    if family.qk_norm == "full" and heads * head_dim != hidden:
        raise UnsupportedError(
            f"head_dim must be hidden_size / num_attention_heads where queries and keys are normed whole, "
            f"got {head_dim} with hidden_size {hidden} and {heads} heads"
        )
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope_from_config(fields, head_dim),
        qkv_bias=fields.flag(family.qkv_bias) if family.qkv_bias else False,
        out_bias=fields.flag(family.out_bias) if family.out_bias else False,
        qk_norm=family.qk_norm,
        clip_qkv=fields.optional_number("clip_qkv") if family.qk_norm == "full" else None,
    )
