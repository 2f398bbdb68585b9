"""Routers of every kind that `RouterSpec` describes, against the routers of transformers.

Where scores nearly tie, rounding decides what a top-k takes: choices are compared as sets, on tokens whose K-th score
leads the next one by `MARGIN` at least. Where logits are float32 that is all of them.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.nn.router import Router
from ef_jax.spec import RouterGroups, RouterNormalize, RouterSpec

EXPERTS, HIDDEN, TOP_K = 16, 24, 4
TOKENS = 64

MARGIN = {"float32": 1e-6, "bfloat16": 1e-2}

SIGMOID_GROUPS = RouterSpec(
    score="sigmoid",
    select_bias=True,
    groups=RouterGroups(count=4, keep=2, score="top2_sum"),
    normalize=RouterNormalize(eps=1e-20),
    scale=2.5,
    dtype="f32",
)

# Model's type in transformers, its router's class, config fields, our spec.
CASES: dict[str, tuple[str, str, dict[str, Any], RouterSpec]] = {
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeTopKRouter", {"norm_topk_prob": False}, RouterSpec()),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, RouterSpec(normalize=RouterNormalize())),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextTopKRouter",
        {"norm_topk_prob": True},
        RouterSpec(normalize=RouterNormalize()),
    ),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeTopKRouter", {}, RouterSpec(normalize=RouterNormalize())),
    "olmoe": ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": True}, RouterSpec(normalize=RouterNormalize())),
    "mixtral": ("mixtral", "MixtralTopKRouter", {}, RouterSpec(normalize=RouterNormalize(), dtype="model_keep_f32")),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter", {}, RouterSpec(order="topk_then_score", bias=True)),
    "granitemoe": ("granitemoe", "GraniteMoeTopKRouter", {}, RouterSpec(order="topk_then_score")),
    "llama4": ("llama4", "Llama4Router", {}, RouterSpec(order="topk_then_score", score="sigmoid")),
    "phimoe": (
        "phimoe",
        "PhimoeTopKRouter",
        {"router_jitter_noise": 0.01, "input_jitter_noise": 0.0, "num_experts_per_tok": 2},
        RouterSpec(sparse_mixer=0.01),
    ),
    "phimoe_wide": (
        "phimoe",
        "PhimoeTopKRouter",
        {"router_jitter_noise": 0.3, "input_jitter_noise": 0.0, "num_experts_per_tok": 2},
        RouterSpec(sparse_mixer=0.3),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        RouterSpec(groups=RouterGroups(count=4, keep=2, score="max", mask=0.0), scale=16.0, dtype="f32"),
    ),
    "deepseek_v2_greedy": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        RouterSpec(dtype="f32"),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"norm_topk_prob": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        SIGMOID_GROUPS,
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeTopkRouter",
        {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        dataclasses.replace(SIGMOID_GROUPS, groups=RouterGroups(count=1, keep=1, score="top2_sum")),
    ),
    "minimax_m2": (
        "minimax_m2",
        "MiniMaxM2TopKRouter",
        {},
        RouterSpec(score="sigmoid", select_bias=True, normalize=RouterNormalize(), dtype="model_keep_f32"),
    ),
    "deepseek_v4": (
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        RouterSpec(
            score="sqrt_softplus",
            select_bias=True,
            normalize=RouterNormalize(eps=1e-20),
            scale=1.5,
        ),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_norm_min": 0.9},
        RouterSpec(
            select_bias=True, normalize=RouterNormalize(minimum=0.9), dtype="f32_cast_back", weight_dtype="float32"
        ),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("dtype", MARGIN)
@pytest.mark.parametrize("case", CASES)
def test_against_transformers(case: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, name, fields, spec = CASES[case]
    sizes = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "moe_num_experts": EXPERTS, "hidden_size": HIDDEN}
    config = SimpleNamespace(**{"num_experts_per_tok": TOP_K} | sizes | fields)
    top_k = config.num_experts_per_tok
    modeling = getattr(transformers.models, family)
    router = getattr(getattr(modeling, f"modeling_{family}"), name)(config).eval()
    rng = np.random.default_rng(0)
    model_dtype = getattr(torch, dtype)
    stored = torch.float32 if spec.weight_dtype == "float32" else model_dtype
    weight = torch.from_numpy(rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32) / 3).to(stored)
    bias = torch.from_numpy(rng.normal(size=EXPERTS).astype(np.float32) / 5)
    x = torch.from_numpy(rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)).to(model_dtype)
    with torch.no_grad():
        router.weight.data = weight
        if spec.bias:
            bias = bias.to(model_dtype)
            router.bias.data = bias
        corrections = [value for key, value in [*router.named_buffers(), *router.named_parameters()] if "bias" in key]
        for correction in corrections:
            correction.copy_(bias.reshape(correction.shape))
        passed = [bias] if family == "minimax_m2" else []  # its bias is the block's
        assert bool([*corrections, *passed]) == (spec.bias or spec.select_bias)
        outputs = router(x, *passed)
        if family == "llama4":  # scores of all experts, 0 where not chosen
            weights, ids = outputs[0].topk(top_k, dim=-1)
            weights = outputs[0].gather(-1, ids)
        else:
            _, weights, ids = outputs
        assert weights.dtype == (model_dtype if spec.casts_back else torch.float32)
        weights, ids = weights.float().numpy(), ids.numpy()

    def ours(tensor: Any) -> jax.Array:
        return jnp.asarray(tensor.float().numpy(), str(tensor.dtype).removeprefix("torch."))

    logits = nn.router_logits(ours(x), ours(weight), ours(bias) if spec.bias else None, spec)
    select_bias = ours(bias) if spec.select_bias else None
    our_ids, our_weights = jax.jit(lambda logits: nn.route(logits, spec, top_k, select_bias, dtype))(logits)
    assert our_ids.dtype == jnp.int32
    assert our_weights.dtype == (dtype if spec.casts_back else "float32")
    choice = np.sort(np.asarray(nn.choice_scores(logits, spec, select_bias)), -1)[:, ::-1]
    clear = choice[:, top_k - 1] - choice[:, top_k] > MARGIN[logits.dtype.name]
    assert clear.mean() > (0.5 if logits.dtype == jnp.bfloat16 else 0.999)
    order, our_order = np.argsort(ids, -1), np.argsort(our_ids, -1)  # some of theirs come unsorted
    np.testing.assert_array_equal(np.sort(our_ids, -1)[clear], np.sort(ids, -1)[clear])
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(our_weights, np.float32), our_order, -1)[clear],
        np.take_along_axis(weights, order, -1)[clear],
        rtol=2e-5 if dtype == "float32" else 2e-2,
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("model", "bfloat16"), ("model_keep_f32", "float32"), ("f32", "float32"), ("f32_cast_back", "bfloat16")],
)
def test_dtypes(dtype: Any, expected: str) -> None:
    spec = RouterSpec(dtype=dtype)
    x, weight = jnp.ones((3, HIDDEN), jnp.bfloat16), jnp.ones((EXPERTS, HIDDEN), jnp.bfloat16)
    logits = nn.router_logits(x, weight, None, spec)
    assert logits.dtype == ("bfloat16" if dtype.startswith("model") else "float32")
    ids, weights = nn.route(logits, spec, TOP_K, dtype=jnp.bfloat16)
    assert weights.dtype == expected
    np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(TOP_K), (3, TOP_K)))  # ties: the lower id first


def test_softmax_weights_of_all_experts_sum_to_one() -> None:
    _, weights = nn.route(jnp.linspace(-5, 5, EXPERTS)[None], RouterSpec(), EXPERTS)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (np.diff(np.asarray(weights)[0]) <= 0).all()


def test_sparse_mixer_leaves_out_what_is_far_from_each_choice() -> None:
    spec = RouterSpec(sparse_mixer=0.05)  # near: within a tenth of the choice's logit, or of an expert's own size
    ids, weights = nn.route(jnp.array([[4.0, 3.8, 3.0, -1.0], [-1.0, -1.05, -2.0, -1.3]]), spec, 2)
    np.testing.assert_array_equal(ids, [[0, 1], [0, 1]])
    first, second = np.exp([0, -0.2]), np.exp([0, -0.05])
    np.testing.assert_allclose(weights, [[1 / first.sum(), 1], [1 / second.sum(), 1]], rtol=1e-6)


def test_sparse_mixer_of_scores_of_zero() -> None:
    _, weights = nn.route(jnp.zeros((1, 4)), RouterSpec(sparse_mixer=0.01), 2)
    np.testing.assert_allclose(weights, [[1 / 4, 1 / 3]], rtol=1e-6)


def test_a_router_keeps_float32_weights() -> None:
    spec = RouterSpec(weight_dtype="float32", dtype="f32_cast_back", select_bias=True, bias=True)
    router = Router(spec, hidden=HIDDEN, experts=EXPERTS, top_k=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert router.bias is not None
    assert (router.weight.dtype, router.bias.dtype) == ("float32", "bfloat16")
    h = jnp.asarray(np.random.default_rng(0).normal(size=(5, HIDDEN)), jnp.bfloat16)
    ids, weights = router(h)
    assert weights.dtype == "bfloat16"
    exact = np.asarray(h, np.float64) @ np.asarray(router.weight, np.float64).T
    np.testing.assert_array_equal(ids, np.argsort(-exact, -1)[:, :2])
