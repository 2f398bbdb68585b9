"""The Triton backend: Pallas kernels for NVIDIA GPUs from Ampere on, for as long as jax lowers them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.kernel_activations import kernel_activation
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.quantized import is_packed
from pallas_kernels.grouped_ffn.storage import Pool
from pallas_kernels.grouped_ffn.tiles import Operation
from pallas_kernels.grouped_ffn.triton_tiles import candidates, tile_height, tiles_for
from pallas_kernels.grouped_ffn.work_items import row_items, work_items

_OLDEST = (8, 0)
_TALLEST = 128


def _refuses(problem: Problem) -> str | None:
    target = problem.target
    if target.platform != "cuda":
        return f"it needs an NVIDIA GPU, the target is {target.platform}"
    if target.capability is None or target.capability < _OLDEST:
        return f"it needs compute capability 8.0 or more, {target.device_kind} has {target.capability}"
    if problem.dtype.name not in ("bfloat16", "float16", "float32"):
        return f"it has no kernel for rows of {problem.dtype}"
    if problem.tile_rows > _TALLEST:
        return f"its tiles have at most {_TALLEST} rows, tile_rows is {problem.tile_rows}"
    stored = problem.slots * 3 * problem.contract * problem.width // (2 if is_packed(problem.storage) else 1)
    if problem.storage != "dense" and 2**31 < stored <= 2**32:
        # Pallas counts places in 32 bits, signed, up to arrays of 2^32 bytes.
        return f"jax miscounts the places of 8-bit arrays from 2 to 4 GiB, the pool's values have {stored} bytes"
    return None


def _tile_table(
    slot_of_group: Int32[Array, "G"], group_sizes: Int32[Array, "G"] | None, rows: int, tile_rows: int
) -> Int32[Array, "3 items"]:
    """Slot, first row and number of rows of each tile, no rows where there is no such tile."""
    if group_sizes is None:
        items = row_items(slot_of_group)
    else:
        items = work_items(group_sizes, slot_of_group, total_rows=rows, tile_rows=tile_rows)
    exists = jnp.arange(items.row.shape[0], dtype=jnp.int32) < items.total
    count = jnp.where(exists, items.rows, 0)
    return jnp.stack([jnp.maximum(slot_of_group[items.group], 0), items.row, count])


def _multiply(
    operation: Operation,
    x: Float[Array, "M C"],
    pool: Pool,
    biases: tuple[Float[Array, "S N"], ...],
    table: Int32[Array, "3 items"],
    out: Float[Array, "M N"] | jax.ShapeDtypeStruct,
    problem: Problem,
    **plan: Any,
) -> Float[Array, "M N"]:
    from pallas_kernels.grouped_ffn.triton_matmul import Plan, slot_matmul

    return slot_matmul(
        x,
        pool,
        biases,
        table,
        out,
        Plan(
            name=f"grouped_{operation}",
            height=tile_height(problem),
            tiles=tiles_for(operation, problem),
            interpret=problem.target.interpret,
            **plan,
        ),
    )


def _ffn(
    x: Float[Array, "M D"],
    pool: Pool,
    biases: ExpertBiases | None,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
    problem: Problem,
) -> Float[Array, "M D"]:
    if x.shape[0] == 0:
        return out
    table = _tile_table(slot_of_group, group_sizes, x.shape[0], problem.tile_rows)
    inner_biases, down_bias = ((), ()) if biases is None else ((biases.gate, biases.up), (biases.down,))
    down = problem.down_part
    inward = {"parts": tuple(range(down)), "contract_last": True, "combine": kernel_activation(problem)}
    anything = jax.ShapeDtypeStruct((x.shape[0], problem.width), x.dtype)
    operation: Operation = "gate_up" if problem.gated else "matmul"
    inner = _multiply(operation, x, pool, inner_biases, table, anything, problem, **inward)
    return _multiply("down", inner, pool, down_bias, table, out, problem, parts=(down,), contract_last=False)


def _matmul(
    x: Float[Array, "M C"],
    pool: Pool,
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M N"],
    problem: Problem,
    part: int,
    contract_last: bool,
) -> Float[Array, "M N"]:
    if x.shape[0] == 0:
        return out
    table = _tile_table(slot_of_group, group_sizes, x.shape[0], problem.tile_rows)
    return _multiply("matmul", x, pool, (), table, out, problem, parts=(part,), contract_last=contract_last)


def _outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
) -> Float32[Array, "S A B"]:
    from pallas_kernels.grouped_ffn.triton_outer import slot_outer

    if a.shape[0] == 0:
        return jnp.zeros((problem.slots, a.shape[1], b.shape[1]), jnp.float32)
    sizes = jnp.ones_like(slot_of_group) if group_sizes is None else group_sizes
    firsts = jnp.cumsum(sizes) - sizes
    order = jnp.argsort(slot_of_group, stable=True)
    slots = jnp.arange(problem.slots, dtype=jnp.int32)
    begin, end = (
        jnp.searchsorted(slot_of_group[order], slots, side=side, method="compare_all").astype(jnp.int32)
        for side in ("left", "right")
    )
    return slot_outer(
        a,
        b,
        jnp.stack([firsts[order], sizes[order]]),
        jnp.stack([begin, end - begin]),
        tiles_for("outer", problem),
        interpret=problem.target.interpret,
    )


BACKEND = Backend(name="triton", refuses=_refuses, ffn=_ffn, matmul=_matmul, outer=_outer, candidates=candidates)
