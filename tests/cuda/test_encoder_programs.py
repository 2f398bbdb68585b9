"""The programs of a model with an encoder compile for an H100: prompts that run whole, and what the decoder keeps."""

import dataclasses

import pytest

from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.programs import Programs
from ef_jax.spec import ExpertSpec, LayerSpec, RelativeAttentionSpec, RouterSpec
from tests.cuda import aot
from tests.cuda.test_engine_programs import (
    QWEN3_LIKE,
    SLOTS,
    looking,
    programs_are_lowered_for_h100,  # noqa: F401  (fixtures)
    the_assembler_is_found,  # noqa: F401
)

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

SWITCH_LIKE = dataclasses.replace(
    QWEN3_LIKE,
    tie_embeddings=True,
    layers=(
        LayerSpec(ffn="dense"),
        LayerSpec(ffn="moe"),
        LayerSpec(ffn="dense", stack="encoder"),
        LayerSpec(ffn="moe", stack="encoder"),
    ),
    attention=RelativeAttentionSpec(heads=8, head_dim=64, buckets=32, max_distance=128),
    router=RouterSpec(dtype="f32_cast_back", rounded_choice=True, capacity=64),
    experts=ExpertSpec(count=32, top_k=1, width=256, activation="relu", gated=False),
    dense_width=256,
    decoder_start=0,
)


def test_every_program_compiles() -> None:
    programs = Programs(
        SWITCH_LIKE,
        batch=2,
        context=20,
        chunk=20,
        pool_slots=SLOTS,
        sharding=aot.sharding(),
        kernels=choose_kernels(SWITCH_LIKE, aot.h100()),
        look_ahead=dataclasses.replace(looking(SWITCH_LIKE, False), distances=1),
    )
    assert programs.kernels.decode in ("mosaic", "triton")
    assert programs.chunk_widths == (16, 20)
    programs.compile_all()
    # Of a prompt: its layers, a wave, the end, and what each kind of the decoder's layers keeps of it.
    assert programs.count == 2 + 2 * (2 + 1 + 1 + 2) + 5
