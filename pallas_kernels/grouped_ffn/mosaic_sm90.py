"""The Mosaic backend: Pallas kernels for Hopper's tensor cores (wgmma) and copy engine (TMA)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.kernel_activations import kernel_activation
from pallas_kernels.grouped_ffn.mosaic_items import AlignedItems, aligned_items, tile_height, whole_boxes
from pallas_kernels.grouped_ffn.mosaic_tiles import CHUNK_COLUMNS, candidates, tiles_for
from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.quantized import QuantizedPool
from pallas_kernels.grouped_ffn.storage import Pool, from_storage
from pallas_kernels.grouped_ffn.tiles import Operation

_CAPABILITY = (9, 0)
_OLDEST_INTERPRETER = (0, 11, 2)  # the first that is public, and the first that multiplies transposed tiles
_TALLEST = 128


def _refuses(problem: Problem) -> str | None:
    target = problem.target
    if target.platform != "cuda":
        return f"it needs an NVIDIA GPU, the target is {target.platform}"
    if target.capability != _CAPABILITY:
        return f"its instructions are those of compute capability 9.0, {target.device_kind} has {target.capability}"
    if target.cores < 1:
        return f"it needs the number of multiprocessors of {target.device_kind}, which is unknown"
    if target.interpret and jax.__version_info__ < _OLDEST_INTERPRETER:
        return f"its interpreter needs jax 0.11.2 or later, this is {jax.__version__}"
    if problem.dtype.name not in ("bfloat16", "float16"):
        return f"its tensor core instructions are not exact enough for rows of {problem.dtype}"
    if problem.storage not in ("dense", "int8"):
        return f"it has no kernel for {problem.storage} weights"
    if problem.storage != "dense" and problem.activation is None:
        return f"it has no plain matmul with {problem.storage} weights"
    if problem.contract % CHUNK_COLUMNS or problem.width % CHUNK_COLUMNS or problem.contract * problem.width == 0:
        return f"it needs sizes that {CHUNK_COLUMNS} divides, got {problem.contract} x {problem.width}"
    if problem.tile_rows > _TALLEST:
        return f"its tiles have at most {_TALLEST} rows, tile_rows is {problem.tile_rows}"
    return None


def _items(slot_of_group: Int32[Array, "G"], group_sizes: Int32[Array, "G"] | None, problem: Problem) -> AlignedItems:
    height = tile_height(problem.tile_rows)
    return aligned_items(slot_of_group, group_sizes, total_rows=problem.rows, height=height)


def _multiply(
    operation: Operation,
    x: Float[Array, "R C"],
    pool: Pool,
    biases: tuple[Float[Array, "S N"], ...],
    items: AlignedItems,
    out: Float[Array, "M N"] | jax.ShapeDtypeStruct,
    problem: Problem,
    *,
    parts: tuple[int, ...],
    contract_last: bool,
    epilogue: Callable[..., Any],
) -> Float[Array, "M N"]:
    from pallas_kernels.grouped_ffn.mosaic_project import project

    scales: tuple[jax.Array, ...] = ()
    if isinstance(pool, QuantizedPool):
        scales = tuple(pool.down_scales[:, 0] if part == 2 else pool.gate_up_scales[:, part, :, 0] for part in parts)
    blocks = pool.values if isinstance(pool, QuantizedPool) else from_storage(pool, x.dtype)
    return project(
        x,
        blocks,
        scales,
        biases,
        items,
        out,
        parts=parts,
        contract_last=contract_last,
        epilogue=epilogue,
        height=tile_height(problem.tile_rows),
        tiles=tiles_for(operation, problem),
        cores=problem.target.cores,
        interpret=problem.target.interpret,
        name=f"grouped_{operation}",
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
    items = _items(slot_of_group, group_sizes, problem)
    inner_biases, down_bias = ((), ()) if biases is None else ((biases.gate, biases.up), (biases.down,))
    act, last = kernel_activation(problem), problem.down_part
    inward: dict[str, Any] = {"parts": tuple(range(last)), "contract_last": True, "epilogue": act}
    down: dict[str, Any] = {"parts": (last,), "contract_last": False, "epilogue": _unchanged}
    operation: Operation = "gate_up" if problem.gated else "matmul"
    anything = jax.ShapeDtypeStruct((whole_boxes(x.shape[0]), problem.width), x.dtype)
    inner = _multiply(operation, x, pool, inner_biases, items, anything, problem, **inward)
    return _multiply("down", inner, pool, down_bias, items, out, problem, **down)


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
    items = _items(slot_of_group, group_sizes, problem)
    plain: dict[str, Any] = {"parts": (part,), "contract_last": contract_last, "epilogue": _unchanged}
    return _multiply("matmul", x, pool, (), items, out, problem, **plain)


def _unchanged(sums: jax.Array) -> jax.Array:
    return sums


def _outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    problem: Problem,
) -> Float32[Array, "S A B"]:
    if not slot_of_group.shape[0] or not a.shape[0]:
        return jnp.zeros((problem.slots, a.shape[1], b.shape[1]), jnp.float32)
    from pallas_kernels.grouped_ffn.mosaic_outer import outer

    return outer(
        a,
        b,
        slot_of_group,
        group_sizes,
        slots=problem.slots,
        tiles=tiles_for("outer", problem),
        cores=problem.target.cores,
        interpret=problem.target.interpret,
    )


BACKEND = Backend(name="mosaic", refuses=_refuses, ffn=_ffn, matmul=_matmul, outer=_outer, candidates=candidates)
