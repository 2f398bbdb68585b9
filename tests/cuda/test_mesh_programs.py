"""The programs of a model on eight H100s compile: what they exchange, what they leave in place, what they take."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest

from ef_jax.mesh.exchange import Transport
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.tensor import DenseShares
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.look_ahead import LookAheadSpec
from tests.cuda import aot
from tests.cuda.test_engine_programs import QWEN3_LIKE

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

SPEC = QWEN3_LIKE
KIND = SPEC.layers[0].kind
ROW = SPEC.hidden * SPEC.itemsize
BATCH, CONTEXT, WIDTH, SLOTS = 4, 256, 16, 64  # of each device
CACHE = BATCH * CONTEXT * 2 * SPEC.attention.kv_heads * SPEC.attention.head_dim * SPEC.itemsize
COLLECTIVE = re.compile(
    r"= (.*?) ([a-z-]*(?:all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast))"
    r"(?:-start)?\(%"
)
ARRAY = re.compile(r"\b([a-z]+)(\d+)?\[([\d,]*)\]")


@functools.cache
def programs(mesh: str, transport: Transport, *, looks: bool = False) -> MeshPrograms:
    sizes = {axis: int(size) for axis, _, size in (part.partition("=") for part in mesh.split(","))}
    layout = MeshLayout.of(list(aot.h100s()), **sizes)
    kernels = choose_kernels(SPEC, layout.devices[0])
    assert (kernels.decode, kernels.prompt) == ("mosaic", "mosaic")
    return MeshPrograms(
        DenseShares(SPEC, layout.tensor),
        layout=layout,
        transport=transport,
        batch=BATCH,
        context=CONTEXT,
        chunk=WIDTH,
        pool_slots=SLOTS,
        kernels=kernels,
        look_ahead=LookAheadSpec(distances=2) if looks else None,
    )


def compiled(program: Callable[..., Any], *args: Any) -> Any:
    with aot.lowering_for_h100():
        return program(*args)


def collectives(program: jax.stages.Compiled) -> tuple[list[str], int]:
    """What devices run together, and the bytes of the largest array that one of the gathers gives."""
    found, largest = [], 0
    for line in program.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            arrays = [
                math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8
                for _, bits, shape in ARRAY.findall(match[1])
            ]
            found.append(match[2])
            if match[2] == "all-gather":
                largest = max(largest, *arrays)
    return sorted(found), largest


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes of each device."""
    return program.memory_analysis().temp_size_in_bytes


def in_place(program: jax.stages.Compiled) -> int:
    """Bytes of results that take the place of arguments."""
    return program.memory_analysis().alias_size_in_bytes


def kernels_in(program: jax.stages.Compiled) -> int:
    """Calls of Pallas kernels by Mosaic."""
    return len(re.findall(r'custom_call_target="mosaic_gpu[^"]*"', program.as_text()))


# What routes take on their way: ids and weights of every sequence and token, and the same ids again for the host.
def routes(sources: int, width: int) -> int:
    return sources * BATCH * width * SPEC.experts.top_k * 2 * 4


def outputs(sources: int, width: int) -> int:
    """Bytes of the routed rows that a device may have to serve."""
    return sources * BATCH * width * SPEC.experts.top_k * ROW


ALL = "expert=8"
THERE_OR_BACK = ["all-gather", "ragged-all-to-all"]
THERE_AND_BACK = sorted(2 * THERE_OR_BACK)


def test_a_decode_step_is_one_program_a_layer() -> None:
    """Each sends what it routes and collects what the layer before has sent; caches stay in place, slots where they
    are."""
    of = programs(ALL, "ragged")
    span = of.spans[-1]
    begin, *between = compiled(of.layers, 1, span)
    assert len(between) == len(SPEC.layers) - 1
    assert set(between) == {compiled(of.between, 1, span, KIND, KIND)}
    end, head = compiled(of.end_step), compiled(of.head)
    moves = [THERE_OR_BACK, THERE_AND_BACK, THERE_OR_BACK, ["all-gather"]]
    steps = [begin, between[0], end, head]
    for program, expected in zip(steps, moves, strict=True):
        found, gathered = collectives(program)
        assert found == expected
        assert gathered <= routes(8, 1)
        assert temporaries(program) < 4 * outputs(8, 1) < SLOTS * SPEC.block_bytes / 10
    assert [kernels_in(program) for program in steps] == [0, 2, 2, 0]
    assert [in_place(program) for program in steps] == [CACHE, CACHE, 0, BATCH * SPEC.vocab]


def test_chunks_of_prompts_exchange_and_waves_do_not() -> None:
    of = programs(ALL, "ragged")
    span = of.spans[-1]
    passes = [compiled(of.begin, WIDTH, span), compiled(of.between, WIDTH, span, KIND, KIND)]
    passes.append(compiled(of.end_chunk, WIDTH))
    for program, expected in zip(passes, [THERE_OR_BACK, THERE_AND_BACK, THERE_OR_BACK], strict=True):
        found, gathered = collectives(program)
        assert found == expected
        assert gathered <= routes(8, WIDTH)
        assert temporaries(program) < 2.5 * outputs(8, WIDTH) < SLOTS * SPEC.block_bytes / 4
        assert kernels_in(program) == 0
    assert [in_place(program) for program in passes] == [CACHE, CACHE, BATCH * ROW]
    wave = compiled(of.wave_of, WIDTH, 3)
    assert collectives(wave) == ([], 0)
    assert kernels_in(wave) == 2
    assert in_place(wave) == outputs(8, WIDTH)
    assert temporaries(wave) < outputs(8, WIDTH)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_the_padded_exchange_gathers_rows_and_nothing_larger(width: int) -> None:
    of = programs(ALL, "padded")
    program = compiled(of.between, width, of.spans[-1], KIND, KIND)
    found, gathered = collectives(program)
    assert found == ["all-gather", "all-to-all"]
    assert gathered <= 8 * BATCH * width * ROW + routes(8, width)
    assert in_place(program) == CACHE
    assert temporaries(program) < 4 * outputs(8, width)
    assert kernels_in(program) == (2 if width == 1 else 0)


def test_groups_exchange_each_by_itself() -> None:
    """Only the host's report of ids is of all groups."""
    of = programs("data=2,expert=4", "ragged")
    program = compiled(of.between, 1, of.spans[-1], KIND, KIND)
    found, gathered = collectives(program)
    assert found == ["all-gather", *THERE_AND_BACK]
    assert gathered <= routes(8, 1)
    assert in_place(program) == CACHE
    assert temporaries(program) < 4 * outputs(4, 1)
    ragged = [line for line in program.as_text().splitlines() if "ragged-all-to-all" in line and "replica" in line]
    assert all("replica_groups={{0,1,2,3},{4,5,6,7}}" in line for line in ragged)


def test_devices_along_tensor_share_heads_outputs_and_vocabulary() -> None:
    """Three gathers beside those of the exchange: what attention adds, outputs of experts, logits; each has half of the
    heads, and so of the caches. The steps look ahead."""
    of = programs("expert=4,tensor=2", "ragged", looks=True)
    program, head = compiled(of.between, 1, of.spans[-1], KIND, KIND), compiled(of.head)
    found, gathered = collectives(program)
    assert found == ["all-gather", "all-gather", *THERE_AND_BACK]
    assert gathered <= 2 * BATCH * SPEC.experts.top_k * ROW
    assert in_place(program) == CACHE / 2
    assert temporaries(program) < 4 * outputs(4, 1)
    assert kernels_in(program) == 2
    found, gathered = collectives(head)
    assert found == ["all-gather", "all-gather"]
    assert gathered <= BATCH * SPEC.vocab * 4
