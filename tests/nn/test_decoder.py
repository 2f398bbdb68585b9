"""Decoder modules: caches, padding, windows as data, their definitions, and what compiles how often."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ef_jax import nn
from ef_jax.errors import UnsupportedError
from ef_jax.spec import (
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    RouterGroups,
    RouterNormalize,
    RouterSpec,
    SharedExpertSpec,
)


def model_spec(**changes: Any) -> ModelSpec:
    spec = ModelSpec(
        family="qwen2_moe",
        vocab=64,
        hidden=32,
        max_position=64,
        norm_eps=1e-6,
        tie_embeddings=False,
        dtype="float32",
        layers=(LayerSpec(ffn="moe"), LayerSpec(ffn="dense", window=4), LayerSpec(ffn="moe")),
        attention=AttentionSpec(
            heads=4, kv_heads=2, head_dim=8, rope=RopeSpec(theta=1e4, dim=8), qkv_bias=True, qk_norm="head"
        ),
        router=RouterSpec(normalize=RouterNormalize()),
        experts=ExpertSpec(count=6, top_k=2, width=16),
        shared=SharedExpertSpec(width=24, gated=True),
        dense_width=40,
    )
    return dataclasses.replace(spec, **changes)


@functools.partial(jax.jit, static_argnums=1)
def forward(decoder: nn.Decoder, spec: ModelSpec, ids: Any, positions: Any, caches: list[Any]) -> tuple[Any, list[Any]]:
    """Logits of a chunk; the routed experts are replaced by the sum of their weighted ids."""
    x = decoder.embed_tokens(ids)
    written = []
    for layer, kind, cache in zip(decoder.layers, spec.layers, caches, strict=True):
        x, cache = layer.attend(x, cache, positions, jnp.asarray(nn.reach_of(kind)))
        written.append(cache)
        if kind.ffn == "dense":
            x = layer.finish(x, layer.ffn_input(x))
        else:
            h, chosen, weights = layer.route(x)
            x = layer.finish(x, h, h * (chosen * weights).sum(-1, keepdims=True))
    return decoder.logits(x), written


def run(decoder: nn.Decoder, spec: ModelSpec, ids: np.ndarray, positions: np.ndarray, caches: list[Any]) -> np.ndarray:
    logits, caches[:] = forward(decoder, spec, ids.astype(np.int32), positions.astype(np.int32), caches)
    return np.asarray(logits)


def caches_for(spec: ModelSpec, batch: int, context: int = 24) -> list[Any]:
    return [tuple(map(jnp.zeros_like, nn.cache_shapes(spec, layer.kind, batch, context))) for layer in spec.layers]


@pytest.fixture(scope="module")
def decoder() -> nn.Decoder:
    decoder = nn.Decoder(model_spec(), rngs=nnx.Rngs(0))
    # Larger than the initial 0.02, so that attention and routing really depend on their input.
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, decoder)


def test_prefill_then_one_by_one_is_the_whole(decoder: nn.Decoder) -> None:
    spec = model_spec()
    ids = np.random.default_rng(0).integers(0, spec.vocab, (2, 14))
    positions = np.broadcast_to(np.arange(14), ids.shape)
    whole = run(decoder, spec, ids, positions, caches_for(spec, 2))
    assert whole.std() > 0.1
    caches = caches_for(spec, 2)
    parts = [run(decoder, spec, ids[:, :9], positions[:, :9], caches)]
    parts += [run(decoder, spec, ids[:, t : t + 1], positions[:, t : t + 1], caches) for t in range(9, 14)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)


def test_padding_does_not_disturb(decoder: nn.Decoder) -> None:
    spec = model_spec()
    ids = np.random.default_rng(1).integers(0, spec.vocab, (1, 6))
    alone = run(decoder, spec, ids, np.arange(6)[None], caches_for(spec, 1))
    padded_ids = np.concatenate([np.full((1, 3), 5), ids, np.full((1, 2), 9)], 1)
    positions = np.asarray([[-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, -1]])
    caches = caches_for(spec, 1)
    padded = run(decoder, spec, padded_ids, positions, caches)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, 3:9], alone, atol=2e-5)
    assert not np.asarray(caches[0][0])[:, :, 6:].any()


def test_window_hides_the_past(decoder: nn.Decoder) -> None:
    """With a window of 4 in every layer, the third layer's last token sees 3 x 3 positions back, not more."""
    spec = model_spec(layers=tuple(dataclasses.replace(layer, window=4) for layer in model_spec().layers))
    ids = np.random.default_rng(2).integers(0, spec.vocab, (1, 12))
    changed = ids.copy()
    changed[0, :2] = (changed[0, :2] + 7) % spec.vocab
    positions = np.arange(12)[None]
    before, after = (run(decoder, spec, tokens, positions, caches_for(spec, 1)) for tokens in (ids, changed))
    np.testing.assert_array_equal(before[0, 11], after[0, 11])
    assert np.abs(before[0, 4] - after[0, 4]).max() > 1e-4


@pytest.mark.parametrize(
    "spec",
    [
        model_spec(),
        model_spec(tie_embeddings=True, shared=None, dtype="bfloat16"),
        model_spec(router=RouterSpec(bias=True, select_bias=True, score="sigmoid"), dtype="bfloat16"),
        model_spec(attention=dataclasses.replace(model_spec().attention, qk_norm="full", out_bias=True)),
    ],
)
def test_dense_shapes_are_the_decoders(spec: ModelSpec) -> None:
    shapes = nn.dense_shapes(spec)
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: nn.Decoder(spec, rngs=nnx.Rngs(0)))))
    assert shapes == {".".join(map(str, path)): leaf.get_value() for path, leaf in state}
    assert next(iter(shapes)) == "embed.weight"
    layers = [int(path.split(".")[1]) for path in shapes if path.startswith("layers.")]
    assert layers == sorted(layers)
    assert list(shapes)[-1] == ("norm.weight" if spec.tie_embeddings else "head.weight")


def test_parameter_paths_are_fixed() -> None:
    """These are names in converted checkpoints: changing one breaks every checkpoint."""
    shapes = {path: leaf.shape for path, leaf in nn.dense_shapes(model_spec()).items()}
    moe = {
        "attn.k_norm.weight": (8,),
        "attn.o_proj.weight": (32, 32),
        "attn.q_norm.weight": (8,),
        "attn.qkv_proj.bias": (64,),
        "attn.qkv_proj.weight": (64, 32),
        "attn_norm.weight": (32,),
        "ffn_norm.weight": (32,),
        "router.weight": (6, 32),
        "shared.block": (3, 24, 32),
        "shared.gate.weight": (1, 32),
    }
    dense = {path: shape for path, shape in moe.items() if path[:2] not in ("ro", "sh")} | {"mlp.block": (3, 40, 32)}
    expected = {"embed.weight": (64, 32), "norm.weight": (32,), "head.weight": (64, 32)}
    for index, layer in enumerate((moe, dense, moe)):
        expected |= {f"layers.{index}.{path}": shape for path, shape in layer.items()}
    assert shapes == expected


def test_select_bias_is_float32() -> None:
    spec = model_spec(router=RouterSpec(bias=True, select_bias=True, score="sigmoid"), dtype="bfloat16")
    shapes = nn.dense_shapes(spec)
    assert shapes["layers.0.router.select_bias"].dtype == jnp.float32
    assert shapes["layers.0.router.bias"].dtype == jnp.bfloat16


def test_one_program_serves_all_layers_of_a_kind() -> None:
    spec = model_spec()
    graphdef, paths = nn.layer_definition(spec, spec.layers[0])
    shapes = nn.dense_shapes(spec)
    traces = 0

    @jax.jit
    def step(leaves: list[jax.Array], x: jax.Array, k: jax.Array, positions: jax.Array, reach: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        layer = nn.merge_layer(graphdef, leaves)
        x, cache = layer.attend(x, (k, k), positions, reach)
        h, ids, weights = layer.route(x)
        return layer.finish(x, h, h), ids, weights, cache

    x, k = jnp.ones((1, 1, 32)), jnp.zeros((1, 2, 16, 8))
    for index, window in ((0, 4), (2, 2**30)):
        leaves = [jnp.full(shapes[f"layers.{index}.{path}"].shape, 0.1 * (index + 1)) for path in paths]
        out, ids, weights, _ = step(leaves, x, k, np.zeros((1, 1), np.int32), np.asarray([window, 2**30], np.int32))
        assert (ids.dtype, ids.shape, weights.shape, out.shape) == (jnp.int32, (1, 1, 2), (1, 1, 2), (1, 1, 32))
    assert traces == 1


@pytest.mark.parametrize("tokens", [1, 130])
def test_lowers_for_cuda(tokens: int) -> None:
    spec = model_spec(dtype="bfloat16")
    graphdef, paths = nn.layer_definition(spec, spec.layers[0])
    leaves = [nn.dense_shapes(spec)[f"layers.0.{path}"] for path in paths]

    def step(leaves: list[jax.Array], x: jax.Array, cache: Any, positions: jax.Array, reach: jax.Array) -> Any:
        layer = nn.merge_layer(graphdef, leaves)
        x, cache = layer.attend(x, cache, positions, reach)
        return layer.route(x), cache

    x = jax.ShapeDtypeStruct((2, tokens, 32), jnp.bfloat16)
    cache = nn.cache_shapes(spec, spec.layers[0], 2, 256)
    positions = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    traced = jax.jit(step).trace(leaves, x, cache, positions, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert "stablehlo" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_uneven_router_groups_are_refused() -> None:
    router = RouterSpec(groups=RouterGroups(count=4, keep=1, score="max"))
    with pytest.raises(UnsupportedError, match="6 experts cannot be split into 4"):
        nn.layer_definition(model_spec(router=router), LayerSpec(ffn="moe"))


def test_dense_layer_without_a_width_is_refused() -> None:
    spec = model_spec(layers=(LayerSpec(ffn="moe"),), dense_width=None)
    with pytest.raises(UnsupportedError, match="dense_width"):
        nn.layer_definition(spec, LayerSpec(ffn="dense"))
