"""The exchange between eight H100s compiles by both transports, around the experts' own kernel and in prompts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ef_jax.memory.slot_pool import pool_shapes
from ef_jax.mesh import exchange
from ef_jax.mesh.exchange import Transport, choose_transport
from ef_jax.mesh.layout import AXES, ROW_AXES, MeshLayout
from ef_jax.runtime import steps
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.steps import Routed
from tests.cuda import aot
from tests.cuda.test_engine_programs import QWEN3_LIKE

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

SPEC = QWEN3_LIKE
K, HIDDEN, EXPERTS = SPEC.experts.top_k, SPEC.hidden, SPEC.experts.count
SLOTS = 16  # on each device
ROWS, EACH, EVERYWHERE = PartitionSpec(ROW_AXES), PartitionSpec(AXES), PartitionSpec()
COLLECTIVE = re.compile(r"= (.*?) ([a-z-]*(?:all-to-all|all-gather|all-reduce|collective-permute))(?:-start)?\(%")


def layout(**sizes: int) -> MeshLayout:
    return MeshLayout.of(list(aot.h100s()), **sizes)


def routed(mesh: MeshLayout, batch: int, tokens: int) -> Routed:
    def rows(last: int, dtype: jnp.dtype | type) -> jax.ShapeDtypeStruct:
        return aot.on_mesh(mesh.mesh, ROWS, (batch * mesh.row_shards, tokens, last), dtype)

    return Routed(rows(HIDDEN, jnp.bfloat16), rows(HIDDEN, jnp.bfloat16), rows(K, np.int32), rows(K, np.float32))


def serves(mesh: MeshLayout) -> jax.ShapeDtypeStruct:
    return aot.on_mesh(mesh.mesh, EVERYWHERE, (mesh.expert, EXPERTS), np.int32)


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """What devices run together, and the longest last axis of its arrays."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            arrays = re.findall(r"\w+\[([\d,]+)\]", match[1])
            found.append((match[2], max(int(shape.split(",")[-1]) for shape in arrays)))
    return sorted(found)


def compiled_step(mesh: MeshLayout, transport: Transport, batch: int) -> jax.stages.Compiled:
    """A decode step's part between two routers."""
    kernels = choose_kernels(SPEC, aot.h100s()[0])
    assert kernels.decode in ("mosaic", "triton")
    pool = pool_shapes(SPEC.block_format, SLOTS)

    def step(routed, serves, pool, slot_row):  # type: ignore[no-untyped-def]
        served = exchange.send(routed, serves, transport=transport)
        outputs = steps.run_experts(SPEC, kernels, served, pool, slot_row[0])
        outputs = steps.in_order(SPEC, served, outputs)
        return exchange.collect(outputs, routed, serves, transport=transport)

    mapped = jax.shard_map(
        step, mesh=mesh.mesh, in_specs=(ROWS, EVERYWHERE, EACH, EACH), out_specs=ROWS, check_vma=False
    )
    slots = aot.on_mesh(mesh.mesh, EACH, (mesh.count * SLOTS, *pool.shape[1:]), pool.dtype)
    slot_row = aot.on_mesh(mesh.mesh, EACH, (mesh.count, EXPERTS), np.int32)
    return aot.compile_for_h100(mapped, routed(mesh, batch, 1), serves(mesh), slots, slot_row)


def compiled_of_prompt(mesh: MeshLayout, transport: Transport, tokens: int) -> tuple[jax.stages.Compiled, ...]:
    """A chunk's rows there, and its outputs back, as programs of their own."""

    def there(routed, serves):  # type: ignore[no-untyped-def]
        return exchange.send(routed, serves, transport=transport)

    def back(outputs, routed, serves):  # type: ignore[no-untyped-def]
        return exchange.collect(outputs, routed, serves, transport=transport)

    def mapped(function, specs, out):  # type: ignore[no-untyped-def]
        return jax.shard_map(function, mesh=mesh.mesh, in_specs=specs, out_specs=out, check_vma=False)

    outputs = aot.on_mesh(mesh.mesh, EACH, (mesh.count * mesh.expert * tokens * K, HIDDEN), jnp.bfloat16)
    chunk, table = routed(mesh, 1, tokens), serves(mesh)
    return (
        aot.compile_for_h100(mapped(there, (ROWS, EVERYWHERE), EACH), chunk, table),
        aot.compile_for_h100(mapped(back, (EACH, ROWS, EVERYWHERE), ROWS), outputs, chunk, table),
    )


@pytest.mark.parametrize(
    ("transport", "moves"),
    [
        ("padded", [("all-gather", 2 * K + 2 * K + HIDDEN), ("all-to-all", HIDDEN)]),
        ("ragged", [("all-gather", 2 * K + 2 * K), ("ragged-all-to-all", HIDDEN), ("ragged-all-to-all", HIDDEN)]),
    ],
)
def test_decode_steps_compile(transport: Transport, moves: list[tuple[str, int]]) -> None:
    """Ids and weights are gathered once, in halves of 32 bits; only the padded transport gathers rows."""
    mesh, batch = layout(expert=8), 4
    compiled = compiled_step(mesh, transport, batch)
    assert collectives(compiled) == moves
    outputs = mesh.expert * batch * K * HIDDEN * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * outputs


def test_groups_and_the_tensor_axis_compile() -> None:
    """Devices of a group exchange rows with those of the same index along `tensor`, and share with those of others."""
    mesh = layout(data=2, expert=2, tensor=2)
    compiled = compiled_step(mesh, "ragged", 2)
    assert [name for name, _ in collectives(compiled)] == ["all-gather"] * 2 + ["ragged-all-to-all"] * 2
    text = compiled.as_text()
    ragged = [line for line in text.splitlines() if COLLECTIVE.search(line) and "ragged-all-to-all" in line]
    assert all("replica_groups={{0,2},{1,3},{4,6},{5,7}}" in line for line in ragged)


@pytest.mark.parametrize("transport", ["padded", "ragged"])
def test_prompts_take_no_more_than_their_rows_once_more(transport: Transport) -> None:
    mesh, tokens = layout(expert=8), 256
    there, back = (one.memory_analysis() for one in compiled_of_prompt(mesh, transport, tokens))
    rows = mesh.expert * tokens * HIDDEN * 2
    assert there.temp_size_in_bytes < 1.5 * rows
    assert back.temp_size_in_bytes < 1.5 * rows * K


def test_gpus_of_one_process_exchange_ragged_rows() -> None:
    assert choose_transport(aot.h100s()) == "ragged"
    assert choose_transport(aot.h100s(), "padded") == "padded"
    assert choose_transport(aot.h100s(hosts=2)) == "padded"
    assert choose_transport(aot.h100s(hosts=2), "ragged") == "ragged"
    assert choose_transport([aot.h100s()[0], jax.devices()[0]]) == "padded"
