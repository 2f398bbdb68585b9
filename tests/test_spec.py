"""The specs: what they refuse, what they derive, and their trip through JSON."""

import dataclasses
import json
import math
from collections.abc import Callable

import pytest

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


def model_spec() -> ModelSpec:
    return ModelSpec(
        family="qwen2_moe",
        vocab=64,
        hidden=32,
        max_position=128,
        norm_eps=1e-6,
        tie_embeddings=False,
        dtype="bfloat16",
        layers=(LayerSpec(ffn="moe", window=16), LayerSpec(ffn="dense"), LayerSpec(ffn="moe")),
        attention=AttentionSpec(heads=4, kv_heads=2, head_dim=8, rope=RopeSpec(theta=1e4, dim=8)),
        router=RouterSpec(
            select_bias=True,
            groups=RouterGroups(count=2, keep=1, score="max"),
            normalize=RouterNormalize(eps=1e-20),
        ),
        experts=ExpertSpec(count=8, top_k=2, width=16),
        shared=SharedExpertSpec(width=24, gated=True),
        dense_width=40,
        eos_ids=(1, 2),
    )


def test_derived_sizes() -> None:
    spec = model_spec()
    assert spec.moe_layers == (0, 2)
    assert spec.total_experts == 16
    assert spec.block_shape == (3, 16, 32)
    assert spec.block_bytes == 3 * 16 * 32 * 2
    assert dataclasses.replace(spec, dtype="float32").block_bytes == 3 * 16 * 32 * 4
    assert spec.attention.qkv_width == (4 + 2 * 2) * 8


def test_trip_through_json() -> None:
    spec = model_spec()
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.router.groups is not None
    assert again.router.groups.mask == -math.inf


@pytest.mark.parametrize("change", [{"colour": 1}, {"experts": {"count": 4}}, {"attention": None}, {"layers": [3]}])
def test_from_dict_refuses(change: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="not a model spec"):
        ModelSpec.from_dict(model_spec().as_dict() | change)


def test_from_dict_refuses_a_missing_field() -> None:
    data = model_spec().as_dict()
    del data["router"]
    with pytest.raises(UnsupportedError, match="router"):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RopeSpec(theta=0, dim=8), "theta"),
        (lambda: RopeSpec(theta=1e4, dim=7), "even"),
        (lambda: RopeSpec(theta=1e4, dim=8, kind="yarn"), "original_max_position"),
        (lambda: AttentionSpec(heads=3, kv_heads=2, head_dim=8, rope=RopeSpec(theta=1e4, dim=8)), "multiple"),
        (lambda: RouterGroups(count=2, keep=3, score="max"), "3 of 2"),
        (lambda: RouterSpec(order="topk_then_score", select_bias=True), "selection bias"),
        (lambda: RouterSpec(scale=math.nan), "scale"),
        (lambda: ExpertSpec(count=4, top_k=5, width=8), "top-k"),
        (lambda: SharedExpertSpec(width=0, gated=False), "width"),
        (lambda: LayerSpec(ffn="moe", window=0), "window"),
        (lambda: dataclasses.replace(model_spec(), vocab=0), "vocab"),
        (lambda: dataclasses.replace(model_spec(), dense_width=None), "dense_width"),
        (lambda: dataclasses.replace(model_spec(), layers=(LayerSpec(ffn="dense"),)), "no MoE layer"),
    ],
)
def test_specs_refuse(build: Callable[[], object], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        build()
