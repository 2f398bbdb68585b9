"""Dense weights divided along the mesh axis `tensor`: layers on slices, and what each device has of a model."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ef_jax import nn
from ef_jax.errors import InputError
from ef_jax.families import spec_from_config
from ef_jax.mesh.layout import ROW_AXES, MeshLayout
from ef_jax.mesh.tensor import DenseShares, check_tensor, place_dense, undivided
from ef_jax.nn import attention, latent_attention
from ef_jax.nn.shares import GATHERED_BYTES, sum_shares
from ef_jax.runtime.dense import DenseWeights
from ef_jax.spec import (
    AttentionSpec,
    ExpertSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    RelativeAttentionSpec,
    RopeSpec,
    RouterSpec,
    SharedExpertSpec,
)
from ef_jax.weights import open_checkpoint
from tests.released import read_config

ROWS, TOKENS, CONTEXT, SEEN = 4, 3, 16, 5
ROPE = RopeSpec(theta=1e4, dim=16)
MOE, DENSE = LayerSpec(ffn="moe"), LayerSpec(ffn="dense")
# XLA:CPU takes products of float32 in another order where a device's part is not a multiple of 16 wide.
QWEN3 = ModelSpec(
    family="qwen3_moe",
    vocab=128,
    hidden=64,
    max_position=64,
    norm_eps=1e-6,
    tie_embeddings=False,
    dtype="float32",
    layers=(MOE, DENSE),
    attention=AttentionSpec(heads=8, kv_heads=4, head_dim=16, rope=ROPE, qk_norm="head"),
    router=RouterSpec(),
    experts=ExpertSpec(count=4, top_k=2, width=16),
    shared=SharedExpertSpec(width=64, gated=True),
    dense_width=128,
)


def like_qwen3(attention: dict[str, Any], **changes: Any) -> ModelSpec:
    assert isinstance(QWEN3.attention, AttentionSpec)
    return dataclasses.replace(QWEN3, attention=dataclasses.replace(QWEN3.attention, **attention), **changes)


OLMOE = like_qwen3({"kv_heads": 8, "qk_norm": "full", "clip_qkv": 2.0}, layers=(MOE,), head_bias=True)
GPT_OSS = like_qwen3({"qk_norm": None, "qkv_bias": True, "out_bias": True, "sinks": True}, layers=(MOE,), vocab=97)
MIXTRAL = like_qwen3({"qk_norm": None, "kv_heads": 2}, layers=(MOE,), tie_embeddings=True, shared=None)
QWEN3_NEXT = like_qwen3({"gated": True, "kv_heads": 2}, layers=(MOE,), norm="rms_offset")
DEEPSEEK = dataclasses.replace(
    QWEN3,
    layers=(MOE,),
    attention=LatentAttentionSpec(
        heads=8, query_rank=16, kv_rank=16, nope_dim=8, value_dim=8, rope=RopeSpec(theta=1e4, dim=8), bias=True
    ),
)
SWITCH = dataclasses.replace(
    QWEN3,
    layers=(MOE,),
    attention=RelativeAttentionSpec(heads=6, head_dim=8, buckets=8, max_distance=16),
    experts=dataclasses.replace(QWEN3.experts, gated=False, activation="relu"),
)


@functools.cache
def arrays_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random weights, of a size that keeps activations near one."""
    random = np.random.default_rng(0)
    return {
        name: (random.standard_normal(shape.shape) * (shape.shape[-1] ** -0.5 if len(shape.shape) > 1 else 1)).astype(
            shape.dtype
        )
        for name, shape in nn.dense_shapes(spec).items()
    }


def run_layers(spec: ModelSpec, arrays: dict[str, Any], x: Any, caches: Any, positions: Any) -> Any:
    """Of each layer over the same input: what it adds, its heads' outputs, its caches; and the logits of the input."""
    heads: list[Any] = []
    results = []

    def spy(*args: Any, **options: Any) -> Any:
        heads.append(plain(*args, **options))
        return heads[-1]

    plain = attention.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", spy)
        patch.setattr(latent_attention, "attend", spy)
        for index, layer in enumerate(spec.layers):
            leaves = [arrays[name] for name in nn.leaf_names(spec, index)]
            module = nn.merge_layer(nn.layer_definition(spec, layer.kind)[0], leaves)
            attended, cache = module.attend(x, caches[index], positions, jnp.asarray(nn.reach_of(layer)))
            h = module.ffn_input(x)
            out = module.finish(jnp.zeros_like(x), h, None if layer.ffn == "dense" else jnp.zeros_like(h))
            results.append((attended, out, cache))
    graphdef, paths = nn.top_definition(spec)
    return results, heads, nn.merge_top(graphdef, [arrays[path] for path in paths]).logits(x)


def compare(spec: ModelSpec, expert: int, tensor: int, tolerance: float) -> None:
    """One device's results against those of the mesh: what shares are summed to within `tolerance` of the largest, all
    that comes before bit-equal, where the programs are over as many sequences."""
    check = np.testing.assert_array_equal if expert == 1 else functools.partial(np.testing.assert_allclose, atol=1e-5)
    layout = MeshLayout.of(jax.devices()[: expert * tensor], expert=expert, tensor=tensor)
    shares, arrays, random = DenseShares(spec, tensor), arrays_of(spec), np.random.default_rng(1)
    dtype = jnp.dtype(spec.dtype)
    x = random.standard_normal((ROWS, TOKENS, spec.hidden)).astype(dtype)
    positions = SEEN + np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS))
    caches, on_mesh, places = [], [], []
    for layer in spec.layers:
        shapes = nn.cache_shapes(spec, layer.kind, ROWS, CONTEXT)
        local = nn.cache_shapes(shares.spec, layer.kind, ROWS // expert, CONTEXT)
        by_heads = layer.mixer == "attention" and isinstance(spec.attention, AttentionSpec)
        if by_heads:
            full = [random.standard_normal(shape.shape).astype(dtype).view(shape.dtype) for shape in shapes]
            copies = tensor * local[0].shape[1] // shapes[0].shape[1]
            on_mesh.append(tuple(np.repeat(cache, copies, axis=1) for cache in full))
        else:
            full = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
            on_mesh.append(tuple(full))
        caches.append(tuple(full))
        places.append(P(ROW_AXES, "tensor") if by_heads else P(ROW_AXES))
    want, heads, logits = jax.jit(functools.partial(run_layers, spec))(arrays, x, caches, positions)
    joined = {
        name: np.concatenate(
            [shares.part(name, array, index) for index in range(tensor)], axis=shares.divisions[name].axis
        )
        if shares.divisions[name]
        else array
        for name, array in arrays.items()
    }
    rows = P(ROW_AXES)
    of_heads = P(ROW_AXES, None, "tensor")
    mapped = jax.jit(
        jax.shard_map(
            functools.partial(run_layers, shares.spec),
            mesh=layout.mesh,
            in_specs=({name: shares.partition(name) for name in joined}, rows, places, rows),
            out_specs=([(rows, rows, place) for place in places], [of_heads] * len(heads), rows),
            check_vma=False,
        )
    )
    got, own_heads, own_logits = mapped(joined, x, on_mesh, positions)
    for one, ours in zip((logits, *heads), (own_logits, *own_heads), strict=True):
        check(one, ours)
    for (attended, out, cache), (our_attended, our_out, our_cache) in zip(want, got, strict=True):
        for one, ours in ((attended - x, our_attended - x), (out, our_out)):
            one, ours = np.asarray(one, np.float32), np.asarray(ours, np.float32)
            np.testing.assert_allclose(ours, one, rtol=0, atol=tolerance * np.abs(one).max())
        for one, ours in zip(cache, our_cache, strict=True):
            copies = ours.shape[1] // one.shape[1] if ours.ndim > 1 else 1
            check(np.repeat(one, copies, axis=1) if copies > 1 else one, ours)


@pytest.mark.parametrize(
    ("spec", "expert", "tensor"),
    [
        pytest.param(QWEN3, 2, 2, id="qwen3"),
        pytest.param(OLMOE, 1, 2, id="olmoe"),
        pytest.param(GPT_OSS, 1, 2, id="gpt-oss"),
        pytest.param(MIXTRAL, 1, 4, id="mixtral"),
        pytest.param(QWEN3_NEXT, 1, 4, id="qwen3-next"),
        pytest.param(DEEPSEEK, 1, 4, id="deepseek"),
        pytest.param(SWITCH, 1, 4, id="switch"),
    ],
)
def test_layers_are_one_devices(spec: ModelSpec, expert: int, tensor: int) -> None:
    compare(spec, expert, tensor, 1e-6)


def test_rounded_layers_are_one_devices_but_for_a_rounding() -> None:
    """16 bits: neighbours of a part's sum, and then of the residual stream."""
    compare(dataclasses.replace(OLMOE, dtype="bfloat16"), 1, 2, 2**-7)


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss-20b", "llama-4-scout", "qwen3-next-80b-a3b", "switch-base-8"])
def test_slices_of_released_models_are_the_arrays_of_smaller_ones(name: str) -> None:
    spec = spec_from_config(read_config(name))
    shares, whole = DenseShares(spec, 8), nn.dense_shapes(spec)
    for path, array in whole.items():
        part = shares.part(path, np.broadcast_to(np.int8(0), array.shape), 7)
        assert (part.shape, array.dtype) == (shares.shapes[path].shape, shares.shapes[path].dtype), path
        if (division := shares.divisions[path]) is not None and all(copies == 1 for _, copies in division.runs):
            assert 8 * part.size == array.size
            assert shares.global_shape(path) == array.shape
    named = {
        path.removeprefix("layers.").lstrip("0123456789.")
        for path, division in shares.divisions.items()
        if division is not None
    }
    assert (
        named
        == {
            "deepseek-v3": {f"attn.{of}" for of in ("q_up.weight", "k_up", "v_up", "o_proj.weight")}
            | {"mlp.block", "shared.block", "head.weight"},
            "gpt-oss-20b": {f"attn.{of}" for of in ("qkv_proj.weight", "qkv_proj.bias", "sinks", "o_proj.weight")}
            | {"head.weight"},
            "llama-4-scout": {"attn.qkv_proj.weight", "attn.o_proj.weight", "shared.block", "head.weight"},
            "qwen3-next-80b-a3b": {"attn.qkv_proj.weight", "attn.o_proj.weight", "shared.block", "head.weight"},
            "switch-base-8": {"mlp.block"},
        }[name]
    )
    assert (
        undivided(spec, 8)
        == {
            "deepseek-v3": ("the latents of attention, which are its cache",),
            "gpt-oss-20b": (),
            "llama-4-scout": (),
            "qwen3-next-80b-a3b": ("key/value heads (2 for 8 devices)", "delta nets"),
            "switch-base-8": ("relative attention", "the head (it is the embedding)"),
        }[name]
    )


def test_key_value_heads_of_neighbours_are_the_same_where_they_are_few() -> None:
    """4 devices, 2 key/value heads: the third device has queries 4 and 5 of 8, and the second head."""
    array = np.arange((8 + 2 + 2) * 16)[:, None] // 16
    part = DenseShares(MIXTRAL, 4).part("layers.0.attn.qkv_proj.weight", array, 2)
    np.testing.assert_array_equal(part[::16, 0], [4, 5, 8 + 1, 8 + 2 + 1])


@pytest.mark.parametrize("tensor", [3, 4])
def test_sums_have_the_same_bits_at_every_size(tensor: int) -> None:
    """A row's sum is that of the row alone, whatever is beside it and however much that is."""
    parts = np.random.default_rng(0).standard_normal((tensor, 1032, 256)).astype(np.float32)
    mesh = MeshLayout.of(jax.devices()[:tensor], tensor=tensor).mesh

    def both(part: Any) -> Any:
        return sum_shares(part[0], tensor), sum_shares(part[0, -2:], tensor)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
    jitted = jax.jit(mapped)
    assert parts[0].nbytes > GATHERED_BYTES
    assert "all-to-all" in jitted.lower(parts).compile().as_text()
    of_many, of_two = jitted(parts)
    of_many, of_two = of_many.reshape(parts.shape), of_two.reshape(tensor, 2, 256)
    np.testing.assert_array_equal(of_many, np.broadcast_to(of_many[0], parts.shape))
    np.testing.assert_array_equal(of_many[:, -2:], of_two)
    np.testing.assert_allclose(of_many[0], parts.sum(0), atol=1e-5)


def test_one_share_leaves_no_trace() -> None:
    shares = DenseShares(QWEN3, 1)
    assert shares.spec == QWEN3
    assert set(shares.divisions.values()) == {None}
    graphdef = nn.layer_definition(QWEN3, MOE)[0]
    assert nn.layer_definition(shares.spec, MOE)[0] is graphdef
    assert nn.layer_definition(DenseShares(QWEN3, 2).spec, MOE)[0] != graphdef
    caches = [nn.cache_shapes(QWEN3, layer.kind, 1, CONTEXT) for layer in QWEN3.layers]
    x, positions = jax.ShapeDtypeStruct((1, 1, 64), np.float32), jax.ShapeDtypeStruct((1, 1), np.int32)
    traced = jax.make_jaxpr(functools.partial(run_layers, QWEN3))(nn.dense_shapes(QWEN3), x, caches, positions)
    assert "all_gather" not in str(traced)
    assert "axis_index" not in str(traced)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        (QWEN3, 0, "tensor=0 is no number of devices"),
        (QWEN3, 3, "tensor=3 does not divide the model, which has 8 heads: use tensor=2 or tensor=4"),
        (like_qwen3({"heads": 12, "kv_heads": 6}), 4, "has 6 key/value heads: use tensor=2$"),
        (like_qwen3({"heads": 16, "qk_norm": "full"}), 8, "has a norm over all of 4 key/value heads: use tensor=4$"),
        (dataclasses.replace(QWEN3, dense_width=36), 8, "has dense layers of width 36: use tensor=4$"),
        (
            dataclasses.replace(DEEPSEEK, shared=SharedExpertSpec(width=27, gated=False)),
            2,
            "of width 27: use tensor=1$",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(spec: ModelSpec, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_tensor(spec, size)


@pytest.mark.parametrize("axes", [{"expert": 4}, {"data": 2, "tensor": 2}, {"expert": 2, "tensor": 4}], ids=str)
def test_arrays_of_a_checkpoint_are_placed(small_moe: Path, axes: dict[str, int]) -> None:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    layout, read = MeshLayout.of(devices, **axes), []
    with open_checkpoint(small_moe) as checkpoint:
        spec, arrays = checkpoint.spec, dict(checkpoint.dense())
        placed = place_dense(checkpoint, layout, advance=read.append)
    assert sum(read) == sum(array.nbytes for array in arrays.values())
    shares = DenseShares(spec, layout.tensor)
    for name, array in arrays.items():
        assert len(placed[name].addressable_shards) == len(devices)
        for shard in placed[name].addressable_shards:
            index = devices.index(shard.device) % layout.tensor
            np.testing.assert_array_equal(np.asarray(shard.data), shares.part(name, array, index))
            if shares.divisions[name] is not None:
                assert shard.data.nbytes * layout.tensor == placed[name].nbytes
    weights = DenseWeights(spec, placed)
    assert len(list(weights.routers(spec))) == len(spec.moe_layers)
