"""Pre-gating: a layer's own scores choose what it chooses; other layers' are those of their own modules."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef_jax import nn
from ef_jax.nn.norm import NormKind
from ef_jax.spec import LayerSpec, ModelSpec, RouterGroups, RouterNormalize, RouterSpec
from tests.nn.test_decoder import model_spec

DISTANCES = 3

GROUPS = RouterGroups(count=3, keep=2, score="top2_sum")

ROUTERS = {
    "softmax": RouterSpec(),
    "norm_topk": RouterSpec(normalize=RouterNormalize()),
    "topk_then_score": RouterSpec(order="topk_then_score", bias=True),
    "keep_f32": RouterSpec(normalize=RouterNormalize(), dtype="model_keep_f32"),
    "f32": RouterSpec(dtype="f32", groups=RouterGroups(count=3, keep=2, score="max", mask=0.0)),
    "sigmoid_groups": RouterSpec(score="sigmoid", select_bias=True, groups=GROUPS, dtype="f32"),
    "sqrt_softplus": RouterSpec(score="sqrt_softplus", select_bias=True, bias=True),
    "cast_back": RouterSpec(select_bias=True, dtype="f32_cast_back", weight_dtype="float32"),
    "sparse_mixer": RouterSpec(sparse_mixer=0.01),
    "sigmoid_after": RouterSpec(order="topk_then_score", score="sigmoid"),
}

NORMS: tuple[NormKind, ...] = ("rms", "rms_f32", "rms_offset", "layer")


def build(
    router: RouterSpec, dtype: Any, norm: NormKind = "rms"
) -> tuple[ModelSpec, list[nn.DecoderLayer], nn.RouterStack]:
    """A random model's spec, its four MoE layers, which have dense ones between them, and its routers."""
    kinds: tuple[Literal["moe", "dense"], ...] = ("dense", "moe", "moe", "dense", "moe", "moe")
    layers = tuple(LayerSpec(ffn=kind) for kind in kinds)
    experts = dataclasses.replace(model_spec().experts, count=12, top_k=3)
    spec = model_spec(router=router, dtype=dtype, layers=layers, experts=experts, hidden=64, norm=norm)
    rng, shapes = np.random.default_rng(1), nn.dense_shapes(spec)

    def leaf(path: str) -> jax.Array:
        return jnp.asarray(("norm" in path) + rng.normal(0, 0.2, shapes[path].shape), shapes[path].dtype)

    definitions = [nn.layer_definition(spec, layer) for layer in layers]
    leaves = [[leaf(f"layers.{index}.{path}") for path in paths] for index, (_, paths) in enumerate(definitions)]
    modules = [nn.merge_layer(definitions[index][0], leaves[index]) for index in spec.moe_layers]
    return spec, modules, nn.stack_routers(spec, leaves, DISTANCES)


def residual(spec: ModelSpec, *rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(0, 3, (*rows, spec.hidden)), spec.dtype)


@pytest.mark.parametrize(
    ("kind", "norm", "dtype", "rows"),
    [
        *((kind, "rms", "bfloat16", (2, 9)) for kind in ROUTERS),
        *(("cast_back", norm, "bfloat16", (2, 9)) for norm in NORMS[1:]),
        *(("sparse_mixer", norm, "float32", (1, 1)) for norm in NORMS[1:]),
        ("softmax", "rms", "bfloat16", (1, 1)),
        ("softmax", "layer", "bfloat16", (1, 1)),
        ("norm_topk", "rms", "float32", (1, 1)),
        ("norm_topk", "rms", "float32", (1, 70)),
        ("norm_topk", "layer", "float32", (1, 70)),
        ("sigmoid_groups", "rms", "float32", (2, 9)),
    ],
)
def test_every_layer_as_its_own_modules_choose(kind: str, norm: NormKind, dtype: str, rows: tuple[int, int]) -> None:
    spec, layers, stack = build(ROUTERS[kind], dtype, norm)
    x, top_k = residual(spec, *rows), spec.experts.top_k
    expected = np.stack(jax.jit(lambda x: [layer.route(x)[1] for layer in layers])(x), axis=-2)
    run = jax.jit(lambda x, first: nn.pregate(spec, stack, x, first, DISTANCES + 1))
    for first in range(len(layers)):
        scores = run(x, jnp.int32(first))
        inside = len(layers) - first
        chosen = np.asarray(jax.lax.top_k(scores, top_k)[1])
        np.testing.assert_array_equal(chosen[..., :inside, :], expected[..., first:, :][..., : DISTANCES + 1, :])
        assert not np.asarray(scores)[..., inside:, :].any()
    assert len(np.unique(expected)) > top_k


def test_shapes_without_arrays() -> None:
    for kind, norm in zip(("softmax", "topk_then_score", "sigmoid_groups", "cast_back"), NORMS, strict=True):
        spec, _, stack = build(ROUTERS[kind], "bfloat16", norm)
        assert stack.routers.shape == (4 + DISTANCES, 12, 64)
        described = jax.tree.map(lambda a: (a.shape, a.dtype), (stack, nn.router_stack_shapes(spec, DISTANCES)))
        assert described[0] == described[1]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 9), (3, 40)])
def test_scores_bit_for_bit(norm: NormKind, rows: tuple[int, int]) -> None:
    """Not only the choice: at distance 0 the logits are the layer's own."""
    spec, layers, stack = build(ROUTERS["sparse_mixer"], "float32", norm)
    x = residual(spec, *rows)
    for place, layer in enumerate(layers):
        router = layer.router
        assert router is not None
        ours = jax.jit(lambda x, place=place: nn.pregate(spec, stack, x, jnp.int32(place), 1)[..., 0, :])(x)
        own = jax.jit(
            lambda x, layer=layer, router=router: nn.router_logits(
                layer.ffn_input(x), router.weight[...], None, spec.router
            )
        )(x)
        np.testing.assert_array_equal(ours, own)


def test_scores_are_what_the_router_chooses_by() -> None:
    spec, layers, stack = build(ROUTERS["sigmoid_groups"], "float32")
    x = residual(spec, 1, 5)
    scores = nn.pregate(spec, stack, x, jnp.int32(1), 2)[0]
    for place, layer in enumerate(layers[1:3]):
        router = layer.router
        assert router is not None
        assert router.select_bias is not None
        logits = nn.router_logits(layer.ffn_input(x)[0], router.weight[...], None, spec.router)
        biased = np.asarray(jax.nn.sigmoid(logits)) + np.asarray(router.select_bias[...])
        groups = np.sort(biased.reshape(5, 3, 4))[..., -2:].sum(-1)
        out = np.repeat(groups == groups.min(-1, keepdims=True), 4, axis=1)
        np.testing.assert_allclose(scores[:, place], np.where(out, -np.inf, biased), rtol=1e-5)


@pytest.mark.parametrize("kind", ["norm_topk", "sqrt_softplus"])
def test_a_shift_is_added_to_the_logits(kind: str) -> None:
    spec, _, stack = build(ROUTERS[kind], "bfloat16")
    x = residual(spec, 4)
    shift = jnp.asarray(np.random.default_rng(3).normal(0, 2, (3, 12)), jnp.float32).at[0].set(0)
    plain, shifted = (nn.pregate(spec, stack, x, jnp.int32(0), 3, s) for s in (None, shift))
    np.testing.assert_array_equal(shifted[:, 0], plain[:, 0])
    if kind == "norm_topk":
        np.testing.assert_allclose(shifted, plain + shift[None], atol=0.1)
    else:
        assert stack.bias is not None
        biased = stack._replace(bias=stack.bias.at[:3].add(shift.astype(jnp.bfloat16)))
        np.testing.assert_allclose(shifted, nn.pregate(spec, biased, x, jnp.int32(0), 3), atol=0.1)
        assert np.abs(shifted - plain).max() > 0.5


def test_one_program_for_all_sources_lowers_for_cuda() -> None:
    spec, _, _ = build(ROUTERS["norm_topk"], "bfloat16")
    x, first = jax.ShapeDtypeStruct((4, spec.hidden), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(nn.pregate, static_argnums=(0, 4)).trace(spec, nn.router_stack_shapes(spec, 3), x, first, 4)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.dot_general") == 1
    assert traced.lower(lowering_platforms=("cpu",)).as_text().count("stablehlo.dot_general") == 4
