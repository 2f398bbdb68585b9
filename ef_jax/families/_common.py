"""Readers and fields that several families share."""

from collections.abc import Callable, Mapping
from typing import Literal

from ef_jax.errors import UnsupportedError
from ef_jax.families._fields import ConfigFields, show
from ef_jax.families._rope import rope_from_config
from ef_jax.spec import Activation, AttentionSpec, ExpertSpec, LayerSpec, RouterNormalize, RouterSpec

ACTIVATIONS: dict[str | None, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

DTYPES: dict[str | None, Literal["bfloat16", "float16", "float32"]] = {
    None: "float32",  # what torch makes of a config without one
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
}

DEFAULTS: dict[str, object] = {
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": False,
}
"""Defaults that most config classes of transformers share."""

MUST_BE: dict[str, object] = {
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
"""Fields of any config, and the one value that is implemented unless the family says otherwise."""

# Training, bookkeeping and the generation defaults that transformers 4 kept here (5 drops them, and so do we).
INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path
    attention_dropout attn_implementation auto_map begin_suppress_tokens bad_words_ids chunk_size_feed_forward
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

Windows = tuple[int | None, ...]


def no_windows(fields: ConfigFields, layers: int) -> Windows:
    """Every layer sees everything."""
    fields.must_be("sliding_window", (None,), "this family has no sliding window; it must be null")
    return (None,) * layers


def moe_layers(windows: Callable[[ConfigFields, int], Windows]) -> Callable[[ConfigFields, int], tuple[LayerSpec, ...]]:
    """Every layer has experts."""

    def read(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(ffn="moe", window=window) for window in windows(fields, layers))

    return read


def sparse_step_layers(
    windows: Callable[[ConfigFields, int], Windows],
) -> Callable[[ConfigFields, int], tuple[LayerSpec, ...]]:
    """Dense layers by `mlp_only_layers` and `decoder_sparse_step` (Qwen)."""

    def read(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
        step = fields.integer("decoder_sparse_step")
        dense = set(fields.integers("mlp_only_layers", below=layers))
        dense |= {i for i in range(layers) if (i + 1) % step}
        seen = windows(fields, layers)
        return tuple(LayerSpec(ffn="dense" if i in dense else "moe", window=seen[i]) for i in range(layers))

    return read


def leading_dense_layers(name: str = "first_k_dense_replace") -> Callable[[ConfigFields, int], tuple[LayerSpec, ...]]:
    """The first so many layers are dense (DeepSeek, GLM)."""

    def read(fields: ConfigFields, layers: int) -> tuple[LayerSpec, ...]:
        dense = fields.integer(name, minimum=0)
        return tuple(LayerSpec(ffn="dense" if i < dense else "moe") for i in range(layers))

    return read


def layer_kinds(fields: ConfigFields, layers: int, kinds: tuple[str, ...]) -> tuple[str, ...] | None:
    """`layer_types`, one of `kinds` a layer; None if it is not given.

    Raises:
      UnsupportedError: it is anything else.
    """
    types = fields.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list | tuple) or len(types) != layers or any(kind not in kinds for kind in types):
        raise UnsupportedError(f"layer_types must list {layers} of {', '.join(kinds)}, got {show(types)}")
    return tuple(types)


def grouped_query(
    *,
    qkv_bias: str | None = None,
    out_bias: str | None = None,
    qk_norm: Literal["head", "full"] | None = None,
    clip_qkv: bool = False,
    rotary: str | None = None,
    interleaved: bool = False,
    precise: bool = False,
    scale: str | None = None,
    sinks: bool = False,
    gated: bool = False,
    mscales: bool = False,
) -> Callable[[ConfigFields, int], AttentionSpec]:
    """Reader of grouped-query attention; biases and scale are fields' names, None: there is no such thing.

    `rotary` is a field with the rotated share of each head, for which the rope parameters have a place too; `mscales`
    as `rope_from_config` has it.
    """

    def read(fields: ConfigFields, hidden: int) -> AttentionSpec:
        heads = fields.integer("num_attention_heads")
        # Absent or null means one key/value head a query head in the families whose config class has no default.
        kv_heads = fields.optional_integer("num_key_value_heads") or heads
        head_dim = fields.optional_integer("head_dim") or hidden // heads
        return AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope_from_config(
                fields, head_dim, rotary=rotary, interleaved=interleaved, precise=precise, mscales=mscales
            ),
            qkv_bias=fields.flag(qkv_bias) if qkv_bias else False,
            out_bias=fields.flag(out_bias) if out_bias else False,
            qk_norm=qk_norm,
            clip_qkv=fields.optional_number("clip_qkv") if clip_qkv else None,
            scale=fields.number(scale) if scale else None,
            sinks=sinks,
            gated=gated,
        )

    return read


def softmax_router(
    normalize: str | None = None, dtype: Literal["model", "model_keep_f32"] = "model"
) -> Callable[[ConfigFields], RouterSpec]:
    """Softmax over all experts, then the best K; normalised if the field says so, always where there is none."""

    def read(fields: ConfigFields) -> RouterSpec:
        normalized = normalize is None or fields.flag(normalize)
        return RouterSpec(normalize=RouterNormalize() if normalized else None, dtype=dtype)

    return read


def experts(
    width: str,
    count: tuple[str, ...] = ("num_experts", "num_local_experts"),
    top_k: tuple[str, ...] = ("num_experts_per_tok",),
    activations: Mapping[str | None, Activation] = ACTIVATIONS,
) -> Callable[[ConfigFields], ExpertSpec]:
    """Reader of the routed experts; the names are fields' spellings."""

    def read(fields: ConfigFields) -> ExpertSpec:
        return ExpertSpec(
            count=fields.integer(*count),
            top_k=fields.integer(*top_k),
            width=fields.integer(width),
            activation=fields.choice("hidden_act", choices=activations),
        )

    return read


same_window_layers = moe_layers(lambda fields, layers: (fields.optional_integer("sliding_window"),) * layers)
"""Every layer has experts and the same window."""

full_layers = moe_layers(no_windows)
"""Every layer has experts and sees everything."""
