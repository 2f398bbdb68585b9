"""The engine's programs compile for an H100: every kind of layer, prompt chunk and insert."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from ef_jax.memory.slot_pool import MAX_INSERT, insert_blocks, pool_shapes
from ef_jax.nn.correction import CorrectionSpec
from ef_jax.runtime import programs as programs_module
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.look_ahead import LookAheadSpec
from ef_jax.runtime.programs import Programs
from ef_jax.spec import (
    AttentionSpec,
    DeltaNetSpec,
    ExpertSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    RouterGroups,
    RouterNormalize,
    RouterSpec,
    SharedExpertSpec,
)
from pallas_kernels import storage_dtype
from tests.cuda import aot

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

QWEN3_LIKE = ModelSpec(
    family="qwen3_moe",
    vocab=4096,
    hidden=512,
    max_position=4096,
    norm_eps=1e-6,
    tie_embeddings=False,
    dtype="bfloat16",
    layers=(LayerSpec(ffn="moe"),) * 2,
    attention=AttentionSpec(heads=8, kv_heads=2, head_dim=64, rope=RopeSpec(theta=1e6, dim=64), qk_norm="head"),
    router=RouterSpec(normalize=RouterNormalize()),
    experts=ExpertSpec(count=32, top_k=8, width=256),
)
QWEN2_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    layers=(LayerSpec(ffn="dense"), LayerSpec(ffn="moe"), LayerSpec(ffn="dense", window=64), LayerSpec(ffn="moe")),
    shared=SharedExpertSpec(width=256, gated=True),
    dense_width=512,
)
GPT_OSS_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    hidden=2880,
    layers=(LayerSpec(ffn="moe", window=128), LayerSpec(ffn="moe")),
    attention=AttentionSpec(
        heads=64, kv_heads=8, head_dim=64, rope=RopeSpec(theta=1e5, dim=64), qkv_bias=True, out_bias=True, sinks=True
    ),
    router=RouterSpec(order="topk_then_score", bias=True),
    experts=ExpertSpec(count=32, top_k=4, width=2880, activation="clamped_swiglu", bias=True, quantization="mxfp4"),
    norm="rms_f32",
)
DEEPSEEK_V3_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    layers=(LayerSpec(ffn="dense"), LayerSpec(ffn="moe"), LayerSpec(ffn="moe")),
    attention=LatentAttentionSpec(
        heads=16,
        query_rank=192,
        kv_rank=128,
        nope_dim=64,
        value_dim=64,
        rope=RopeSpec(theta=1e4, dim=32, interleaved=True),
    ),
    router=RouterSpec(
        score="sigmoid",
        select_bias=True,
        groups=RouterGroups(count=4, keep=2, score="top2_sum"),
        normalize=RouterNormalize(eps=1e-20),
        scale=2.5,
        dtype="f32",
    ),
    experts=ExpertSpec(count=32, top_k=8, width=256, quantization="fp8"),
    shared=SharedExpertSpec(width=256, gated=False),
    dense_width=512,
)
QWEN3_NEXT_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    layers=(LayerSpec(ffn="moe"), LayerSpec(ffn="moe", mixer="delta_net")),
    attention=dataclasses.replace(QWEN3_LIKE.attention, rope=RopeSpec(theta=1e6, dim=16), gated=True),
    shared=SharedExpertSpec(width=256, gated=True),
    delta_net=DeltaNetSpec(key_heads=4, value_heads=8, key_dim=64, value_dim=64, conv_width=4, fused=True),
    norm="rms_offset",
)
# What Llama 4 and Phi-3.5-MoE have and no other, in one.
LLAMA4_AND_PHIMOE_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    layers=(LayerSpec(ffn="dense", chunk=64), LayerSpec(ffn="moe", chunk=64), LayerSpec(ffn="moe", rope=False)),
    attention=AttentionSpec(
        heads=8,
        kv_heads=2,
        head_dim=64,
        rope=RopeSpec(theta=5e5, dim=64, interleaved=True, precise=True),
        qk_norm="l2",
        temperature=(64.0, 0.1),
    ),
    router=RouterSpec(sparse_mixer=0.01),
    experts=ExpertSpec(count=32, top_k=2, width=256, scale_input=True),
    shared=SharedExpertSpec(width=256, gated=False),
    dense_width=512,
    norm="layer",
    head_bias=True,
)
SLOTS = 512


@pytest.fixture(scope="module", autouse=True)
def the_assembler_is_found() -> None:
    """XLA looks for ptxas at its first compilation; once in many, threads that all did so could not launch it."""
    aot.compile_for_h100(jax.numpy.negative, aot.abstract((8,), np.float32))


@pytest.fixture(autouse=True)
def programs_are_lowered_for_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says so holds in one thread only."""
    real = programs_module.ask_in_parallel

    def lowered(program: Callable[[], Any]) -> Any:
        with aot.lowering_for_h100():
            return program()

    monkeypatch.setattr(
        programs_module, "ask_in_parallel", lambda programs: real([functools.partial(lowered, one) for one in programs])
    )


def looking(spec: ModelSpec, corrected: bool) -> LookAheadSpec:
    layers, experts = len(spec.moe_layers), spec.experts
    sizes = {"layers": layers, "experts": experts.count, "top_k": experts.top_k, "vocab": spec.vocab}
    correction = CorrectionSpec(**sizes, distances=2) if corrected else None
    return LookAheadSpec(distances=2, correction=correction)


@pytest.mark.parametrize(
    ("spec", "look"),
    [
        (QWEN3_LIKE, None),
        (QWEN3_LIKE, True),
        (QWEN2_LIKE, True),
        (DEEPSEEK_V3_LIKE, False),
        (QWEN3_NEXT_LIKE, False),
        (GPT_OSS_LIKE, False),
        (dataclasses.replace(GPT_OSS_LIKE, experts=dataclasses.replace(GPT_OSS_LIKE.experts, quantization=None)), None),
        (LLAMA4_AND_PHIMOE_LIKE, False),
    ],
    ids=[
        "moe-no",
        "moe-corrected",
        "dense-and-shared-corrected",
        "latent-attention-groups-and-fp8",
        "delta-net",
        "mxfp4-and-biases",
        "biases",
        "chunks-scaled-inputs-layer-norms",
    ],
)
def test_every_program_compiles_and_leaves_the_pool_where_it_is(spec: ModelSpec, look: bool | None) -> None:
    programs = Programs(
        spec,
        batch=2,
        context=256,
        chunk=4,
        pool_slots=SLOTS,
        sharding=aot.sharding(),
        kernels=choose_kernels(spec, aot.h100()),
        look_ahead=None if look is None else looking(spec, look),
    )
    assert programs.kernels.decode in ("mosaic", "triton")
    programs.compile_all()
    kinds = 1 + len(set(itertools.pairwise(layer.kind for layer in spec.layers)))
    widths, spans = 1 + len(programs.chunk_widths), len(programs.spans)
    each_chunk = 3 if look else 2  # its wave and its end, and what a correction takes from it
    assert programs.count == widths * spans * kinds + each_chunk * (widths - 1) + 5
    assert programs.workspace_bytes < SLOTS * spec.block_bytes / 10


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
@pytest.mark.parametrize("spec", [QWEN3_LIKE, GPT_OSS_LIKE], ids=["one-array", "several"])
def test_inserts_update_the_pool_in_place(spec: ModelSpec, kind: aot.MemoryKind) -> None:
    form = spec.block_format
    pool = pool_shapes(form, 64, aot.sharding())
    blocks = [aot.abstract(form.shape, storage_dtype(form.dtype), kind)] * MAX_INSERT
    where = jax.ShapeDtypeStruct((MAX_INSERT,), np.int32)
    memory = aot.compile_for_h100(
        insert_blocks, form, pool, blocks, where, static_argnums=0, donate_argnums=1
    ).memory_analysis()
    assert memory.alias_size_in_bytes == 64 * spec.block_bytes
    assert memory.host_argument_size_in_bytes == (kind == "pinned_host") * MAX_INSERT * spec.block_bytes
    assert memory.temp_size_in_bytes <= MAX_INSERT * (spec.block_bytes + 4096)
