"""Routers of every kind that `RouterSpec` describes, against the routers of transformers."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax import nn
from ef_jax.spec import RouterGroups, RouterNormalize, RouterSpec

EXPERTS, HIDDEN, TOP_K = 16, 24, 4

# Module of transformers, its router's class, config fields, our spec.
CASES: dict[str, tuple[str, dict[str, Any], RouterSpec]] = {
    "qwen2_moe": ("Qwen2MoeTopKRouter", {"norm_topk_prob": False}, RouterSpec()),
    "qwen3_moe": ("Qwen3MoeTopKRouter", {"norm_topk_prob": True}, RouterSpec(normalize=RouterNormalize())),
    "olmoe": ("OlmoeTopKRouter", {"norm_topk_prob": True}, RouterSpec(normalize=RouterNormalize())),
    "mixtral": ("MixtralTopKRouter", {}, RouterSpec(normalize=RouterNormalize(), dtype="model_keep_f32")),
    "gpt_oss": ("GptOssTopKRouter", {}, RouterSpec(order="topk_then_score", bias=True)),
    "granitemoe": ("GraniteMoeTopKRouter", {}, RouterSpec(order="topk_then_score")),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        RouterSpec(groups=RouterGroups(count=4, keep=2, score="max", mask=0.0), scale=16.0, dtype="f32"),
    ),
    "deepseek_v3": (
        "DeepseekV3TopkRouter",
        {"norm_topk_prob": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        RouterSpec(
            score="sigmoid",
            select_bias=True,
            groups=RouterGroups(count=4, keep=2, score="top2_sum"),
            normalize=RouterNormalize(eps=1e-20),
            scale=2.5,
            dtype="f32",
        ),
    ),
    "deepseek_v4": (
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        RouterSpec(
            score="sqrt_softplus",
            select_bias=True,
            normalize=RouterNormalize(eps=1e-20),
            scale=1.5,
            dtype="model_keep_f32",
        ),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeTopKRouter",
        {"moe_norm_min": 0.9},
        RouterSpec(select_bias=True, normalize=RouterNormalize(minimum=0.9), dtype="f32"),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("family", CASES)
def test_against_transformers(family: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, fields, spec = CASES[family]
    config = SimpleNamespace(
        num_experts_per_tok=TOP_K,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        hidden_size=HIDDEN,
        moe_num_experts=EXPERTS,
        **fields,
    )
    modeling = getattr(transformers.models, family)
    router = getattr(getattr(modeling, f"modeling_{family}"), name)(config)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32) / 3
    bias = rng.normal(size=EXPERTS).astype(np.float32) / 5
    x = rng.normal(size=(64, HIDDEN)).astype(np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.from_numpy(weight))
        corrections = [value for key, value in [*router.named_buffers(), *router.named_parameters()] if "bias" in key]
        for correction in corrections:
            correction.copy_(torch.from_numpy(bias).reshape(correction.shape))
        assert bool(corrections) == (spec.bias or spec.select_bias)
        _, weights, ids = (value.numpy() for value in router(torch.from_numpy(x)))

    logits = nn.router_logits(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias) if spec.bias else None, spec)
    our_ids, our_weights = nn.route(logits, spec, TOP_K, jnp.asarray(bias) if spec.select_bias else None)
    assert our_ids.dtype == jnp.int32
    order, our_order = np.argsort(ids, -1), np.argsort(our_ids, -1)  # some of theirs come unsorted
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(our_ids), our_order, -1), np.sort(ids, -1))
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(our_weights), our_order, -1), np.take_along_axis(weights, order, -1), rtol=2e-5
    )


@pytest.mark.parametrize(
    ("dtype", "expected"), [("model", "bfloat16"), ("model_keep_f32", "float32"), ("f32", "float32")]
)
def test_dtypes(dtype: Any, expected: str) -> None:
    spec = RouterSpec(dtype=dtype)
    x, weight = jnp.ones((3, HIDDEN), jnp.bfloat16), jnp.ones((EXPERTS, HIDDEN), jnp.bfloat16)
    logits = nn.router_logits(x, weight, None, spec)
    assert logits.dtype == ("float32" if dtype == "f32" else "bfloat16")
    ids, weights = nn.route(logits, spec, TOP_K)
    assert weights.dtype == expected
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(TOP_K), (3, TOP_K)))  # ties: the lower id first


def test_softmax_weights_of_all_experts_sum_to_one() -> None:
    _, weights = nn.route(jnp.linspace(-5, 5, EXPERTS)[None], RouterSpec(), EXPERTS)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (np.diff(np.asarray(weights)[0]) <= 0).all()
