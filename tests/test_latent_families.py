"""What configs of DeepSeek's design and of MiniMax-M2 say beyond what all families share."""

import dataclasses
from typing import Any

import pytest

from ef_jax.errors import UnsupportedError
from ef_jax.families import spec_from_config
from ef_jax.spec import AttentionSpec, LatentAttentionSpec, ModelSpec
from tests.released import read_config


def read(name: str, **changes: Any) -> ModelSpec:
    return spec_from_config(read_config(name) | changes)


def latent(spec: ModelSpec) -> LatentAttentionSpec:
    assert isinstance(spec.attention, LatentAttentionSpec)
    return spec.attention


def test_yarn_scales_the_scores_and_not_the_rotation() -> None:
    attention = latent(read("deepseek-v2-lite"))
    assert attention.scale == pytest.approx(192**-0.5 * 1.2608037774**2)  # 0.0707 ln 40 + 1
    plain = latent(read("deepseek-v2-lite", rope_scaling=None))
    assert plain.scale == pytest.approx(192**-0.5)
    assert attention.rope.precise
    assert not latent(read("deepseek-v3")).rope.precise


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    spec = read("kimi-k2-instruct")
    assert spec.family == "kimi_k2"
    assert spec == dataclasses.replace(read("kimi-k2-instruct", model_type="deepseek_v3"), family="kimi_k2")


def test_groups() -> None:
    assert read("deepseek-v2-lite").router.groups is None
    limited = read("deepseek-v2").router.groups
    assert limited is not None
    assert (limited.count, limited.keep, limited.score, limited.mask) == (8, 3, "max", 0.0)
    assert read("kimi-k2-instruct").router.groups is None, "one group limits nothing"


def test_shared_experts_are_one_of_their_joint_width() -> None:
    shared = read("deepseek-v2-lite").shared
    assert shared is not None
    assert (shared.width, shared.gated) == (2 * 1408, False)
    assert read("deepseek-v2-lite", n_shared_experts=0).shared is None


def test_the_rotated_width_of_minimax_m2() -> None:
    released = read("minimax-m2").attention
    assert isinstance(released, AttentionSpec)
    assert released.rope.dim == 64
    renamed = {"rotary_dim": None}
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert read("minimax-m2", **renamed, rope_parameters=rope).attention == released
    with pytest.raises(UnsupportedError, match="rotary_dim is 32, but partial_rotary_factor makes it 64"):
        read("minimax-m2", rotary_dim=32, rope_parameters=rope)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek-v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-v2", {"num_key_value_heads": 8}, "num_key_value_heads must be num_attention_heads (128)"),
        ("deepseek-v2", {"topk_group": 9}, "router keeps 9 of 8 groups"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", {"qk_rope_head_dim": 63}, "rope dim must be even"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank must be an integer"),
        ("deepseek-v3", {"first_k_dense_replace": 61}, "no MoE layer"),
        ("kimi-k2-instruct", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("glm-4.5", {"use_qk_norm": None}, "use_qk_norm must be true or false"),
        ("glm-4.5", {"partial_rotary_factor": 2.0}, "rope dim 256 is more than head_dim 128"),
        ("minimax-m2", {"attn_type_list": [1, 0]}, "attn_type_list must be 62 ones"),
        ("minimax-m2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ("minimax-m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("minimax-m2", {"rotary_dim": 256}, "rope dim 256 is more than head_dim 128"),
        ("minimax-m2", {"sliding_window": 8}, "sliding_window is 8"),
    ],
)
def test_refuses(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(name, **changes)
    assert words in str(caught.value)
