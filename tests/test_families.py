"""`config.json` -> `ModelSpec`: released configs, defaults, both spellings, refusals, and a fuzz of all of it."""

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ef_jax.errors import UnsupportedError
from ef_jax.families import spec_from_config
from ef_jax.spec import ModelSpec, RopeSpec

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")

# As published: Qwen3-Coder-30B-A3B, Qwen1.5-MoE-A2.7B, Mixtral-8x7B, OLMoE-1B-7B.
RELEASED = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5472, "max_position_embeddings": 262144,
        "max_window_layers": 28, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "qkv_bias": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_cache": True, "use_qk_norm": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192,
        "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
    },
}  # fmt: skip


def released(model_type: str, **changes: object) -> dict[str, object]:
    return {**RELEASED[model_type], **changes}


def test_released_qwen3() -> None:
    spec = spec_from_config(RELEASED["qwen3_moe"])
    assert (spec.hidden, spec.vocab, len(spec.moe_layers), spec.max_position) == (2048, 151936, 48, 262144)
    assert (spec.experts.count, spec.experts.top_k, spec.experts.width) == (128, 8, 768)
    assert spec.router.normalize is not None
    assert spec.attention.qk_norm == "head"
    assert spec.attention.head_dim == 128
    assert not spec.attention.qkv_bias
    assert spec.attention.rope == RopeSpec(theta=1e7, dim=128)
    assert spec.dtype == "bfloat16"
    assert spec.eos_ids == (151645,)
    assert {layer.window for layer in spec.layers} == {None}


def test_released_qwen2_has_a_gated_shared_expert_and_biases() -> None:
    spec = spec_from_config(RELEASED["qwen2_moe"])
    assert spec.shared is not None
    assert (spec.shared.width, spec.shared.gated) == (5632, True)
    assert (spec.attention.qkv_bias, spec.attention.out_bias, spec.attention.qk_norm) == (True, False, None)
    assert spec.router.normalize is None
    assert spec.attention.head_dim == 128
    assert {layer.window for layer in spec.layers} == {None}


def test_released_mixtral_keeps_router_weights_in_f32() -> None:
    spec = spec_from_config(RELEASED["mixtral"])
    assert (spec.experts.count, spec.experts.width) == (8, 14336)
    assert spec.router.dtype == "model_keep_f32"
    assert spec.router.normalize is not None
    assert (spec.bos_id, spec.eos_ids) == (1, (2,))


def test_released_olmoe_norms_over_all_heads() -> None:
    spec = spec_from_config(RELEASED["olmoe"])
    assert spec.attention.qk_norm == "full"
    assert spec.attention.clip_qkv is None
    assert spec_from_config(released("olmoe", clip_qkv=8)).attention.clip_qkv == 8.0


def test_bundled_model(small_moe: Path) -> None:
    spec = spec_from_config(json.loads((small_moe / "config.json").read_text()))
    assert (spec.hidden, spec.experts.count, spec.total_experts) == (192, 32, 256)
    assert spec.tie_embeddings
    assert spec.eos_ids == (0,)


@pytest.mark.parity
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A bare config means what transformers' own config class says, written out in full."""
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    bare, full = spec_from_config({"model_type": model_type}), spec_from_config(written)
    assert bare == full


@pytest.mark.parametrize("model_type", FAMILIES)
def test_new_and_old_spellings_mean_the_same(model_type: str) -> None:
    old = released(model_type)
    new = copy.deepcopy(old)
    new["dtype"] = new.pop("torch_dtype")
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": new.pop("rope_theta")}
    new.pop("rope_scaling", None)
    for one, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if one in old:
            new[other] = new.pop(one)
    assert spec_from_config(new) == spec_from_config(old) == spec_from_config(old | new)


LONGROPE: dict[str, object] = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 64}, "num_experts is 128 but num_local_experts is 64"),
        ({"dtype": "float32"}, "dtype is 'float32' but torch_dtype is 'bfloat16'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is 1e+07"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": LONGROPE | {"long_factor": None}}, "rope_scaling.long_factor"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 63 + [0]}}, "rope_scaling.long_factor"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 63}}, "short_factors"),
        ({"rope_scaling": LONGROPE | {"long_mscale": 1.2}}, "rope_scaling.'long_mscale'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 3}}, "high"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts": "128"}, "num_experts"),
        ({"num_experts_per_tok": 129}, "top-k"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"decoder_sparse_step": 100}, "no MoE layer"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers"),
        ({"mlp_only_layers": list(range(48))}, "no MoE layer"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures"),
        ({"head_dim": 7}, "even"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"a\nb": 1}, "not supported"),
    ],
)
def test_refuses(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        spec_from_config(released("qwen3_moe", **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_longrope() -> None:
    rope = spec_from_config(released("qwen3_moe", rope_scaling=LONGROPE)).attention.rope
    assert rope == RopeSpec(
        kind="longrope",
        theta=1e7,
        dim=128,
        factor=64.0,  # 262,144 positions for 4,096
        original_max_position=4096,
        short_factors=(1.0,) * 64,
        long_factors=(2.0,) * 64,
    )


def test_code_that_comes_with_a_model_is_not_run() -> None:
    plain = spec_from_config(released("qwen3_moe"))
    assert spec_from_config(released("qwen3_moe", auto_map={"AutoModel": "evil.Model"})) == plain


@pytest.mark.parametrize("model_type", [None, "llama", "gpt_neox", 3, ["qwen3_moe"]])
def test_unknown_architecture_lists_the_supported(model_type: object) -> None:
    with pytest.raises(UnsupportedError, match="supported: qwen3_moe, qwen2_moe, mixtral, olmoe"):
        spec_from_config({"model_type": model_type})


def test_olmoe_refuses_what_it_has_not() -> None:
    with pytest.raises(UnsupportedError, match="sliding_window"):
        spec_from_config(released("olmoe", sliding_window=128))
    with pytest.raises(UnsupportedError, match="head_dim"):
        spec_from_config(released("olmoe", head_dim=64))


def test_dense_layers() -> None:
    spec = spec_from_config(
        released("qwen2_moe", num_hidden_layers=6, mlp_only_layers=[3], decoder_sparse_step=2, intermediate_size=40)
    )
    assert spec.moe_layers == (1, 5)
    assert spec.dense_width == 40
    assert spec_from_config(RELEASED["qwen2_moe"]).dense_width is None


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, [8, 8, 8, 8]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, [None] * 4),
        ("qwen3_moe", {"sliding_window": 8}, [None] * 4),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, [8, None, None, None]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, [8, None, 8, None]),
        (
            "qwen2_moe",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
            },
            [None, None, 8, None],
        ),
        ("mixtral", {"sliding_window": 8}, [8, 8, 8, 8]),
    ],
)
def test_windows(model_type: str, changes: dict[str, object], windows: list[int | None]) -> None:
    spec = spec_from_config(released(model_type, num_hidden_layers=4, **changes))
    assert [layer.window for layer in spec.layers] == windows


def test_layer_types_without_a_window_raise() -> None:
    types = ["sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        spec_from_config(released("qwen2_moe", num_hidden_layers=2, layer_types=types))


def test_yarn_as_released_checkpoints_ask_for_it() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = spec_from_config(released("qwen3_moe", rope_scaling=scaling)).attention.rope
    assert rope == RopeSpec(kind="yarn", theta=1e7, dim=128, factor=4.0, original_max_position=32768)
    rope = spec_from_config(released("qwen3_moe", rope_scaling={"type": "yarn", "factor": 4.0})).attention.rope
    assert rope.original_max_position == 262144


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

_ROPE_FIELDS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "original_max_position_embeddings",
    "rope_theta",
    "truncate",
    "type",
)

_ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "yarn", "llama3"])},
    optional=dict.fromkeys(_ROPE_FIELDS, _JSON),
)


@settings(max_examples=400)
@given(st.data())
def test_any_config_gives_a_spec_or_one_clear_line(data: st.DataObject) -> None:
    config = dict(RELEASED[data.draw(st.sampled_from(FAMILIES))])
    names = [*sorted(config), "rope_parameters", "layer_types", "dtype", "num_local_experts", "head_dim", "oddity"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = data.draw(_JSON | _ROPE)
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        config.pop(name, None)
    try:
        spec = spec_from_config(config)
    except UnsupportedError as error:
        message = str(error)
    else:
        message = ""
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
    assert "\n" not in message
    assert len(message) < 400
