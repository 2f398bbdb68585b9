"""The public functions: arguments checked, a backend chosen, gradients attached."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS, UNGATED_ACTIVATIONS
from pallas_kernels.grouped_ffn.backends import choose_backend
from pallas_kernels.grouped_ffn.biases import ExpertBiases
from pallas_kernels.grouped_ffn.checks import check_groups, check_pool
from pallas_kernels.grouped_ffn.gradients import differentiable_ffn, differentiable_matmul
from pallas_kernels.grouped_ffn.problem import Problem, fitting_tile_rows
from pallas_kernels.grouped_ffn.quantized import QuantizedPool
from pallas_kernels.grouped_ffn.target import Target, default_target


def grouped_ffn(
    x_sorted: Float[Array | np.ndarray, "M D"],
    pool: Shaped[Array | np.ndarray, "..."] | QuantizedPool,
    slot_of_group: Int32[Array | np.ndarray, "..."],
    group_sizes: Int32[Array | np.ndarray, "..."] | None,
    *,
    biases: ExpertBiases | None = None,
    activation: str = "silu",
    tile_rows: int | None = None,
    out: Float[Array | np.ndarray, "M D"] | None = None,
    implementation: str | None = None,
    target: Target | None = None,
    checked: bool = False,
) -> Float[Array, "M D"]:
    """`down(act(gate(x), up(x)))` of each row with its group's expert block, read in place from the pool.

    Blocks of two parts have no gate: `down(act(up(x)))`.

    Rows are sorted by group: the first `group_sizes[0]` belong to group 0, and so on. A row's result depends on the
    row, its block and its rank within its group only, not on other rows or on which groups are skipped. Differentiable
    once, in reverse mode, by x, a pool of floats, biases and out.

    Args:
      x_sorted: rows, bfloat16, float16 or float32.
      pool: `[S, 3, F, D]` expert blocks (gate, up, transposed down), of x's dtype or its bits (`storage_dtype`), or
        quantized; or `[S, 2, F, D]` (up, transposed down), without biases.
      slot_of_group: `[G]`, slot of each group's block; -1 skips the group.
      group_sizes: `[G]`, rows of each group; they sum to at most M. None: M groups of one row each, which saves the
        sums over groups.
      biases: of the experts, one row a slot; None where they have none.
      activation: a key of `ACTIVATIONS`; without a gate, of `UNGATED_ACTIVATIONS`.
      tile_rows: height of a tile; part of the result's rounding, so keep it fixed. None: what fits M / G rows.
      out: what rows of skipped groups, and rows past the last group, hold afterwards; zeros where None.
      implementation: a backend's name, or None for the first that can run this.
      target: what to build for; None for jax's default device.
      checked: refuse group sizes and slots that cannot be. Arrays on the host are always checked; with this, arrays on
        a device too, at the cost of waiting for them, and inside jit by `jax.experimental.checkify`.

    Returns:
      `[M, D]` in x's dtype; accumulation is f32, the inner activation is rounded to x's dtype.

    Raises:
      ValueError: shapes, dtypes, sizes or names that do not fit; the message has the values.
      NotImplementedError: the named backend cannot run this; the message says why.
    """
    check_groups(x_sorted.shape[0], pool.shape[0], slot_of_group, group_sizes, checked=checked)
    x_sorted, slot_of_group = jnp.asarray(x_sorted), jnp.asarray(slot_of_group)
    group_sizes = None if group_sizes is None else jnp.asarray(group_sizes)
    held = pool if isinstance(pool, QuantizedPool) else jnp.asarray(pool)
    check_pool(held, x_sorted.dtype)
    slots, parts, width, hidden = held.shape
    if parts not in (2, 3) or hidden != x_sorted.shape[1]:
        raise ValueError(
            f"pool must be [S, 3, F, {x_sorted.shape[1]}], or [S, 2, ...] without a gate, got {held.shape}"
        )
    known = ACTIVATIONS if parts == 3 else UNGATED_ACTIVATIONS
    if activation not in known:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(known)}")
    if biases is not None and parts == 2:
        raise ValueError(f"blocks without a gate take no biases, the pool is {held.shape}")
    for name, bias, shape in (
        ()
        if biases is None
        else zip(biases._fields, biases, ((slots, width), (slots, width), (slots, hidden)), strict=True)
    ):
        if bias.shape != shape:
            raise ValueError(f"the {name} biases must be {shape}, got {bias.shape}")
    problem = Problem(
        rows=x_sorted.shape[0],
        groups=slot_of_group.shape[0],
        slots=slots,
        contract=hidden,
        width=width,
        dtype=np.dtype(x_sorted.dtype),
        storage=held.format if isinstance(held, QuantizedPool) else "dense",
        activation=activation,
        gated=parts == 3,
        biased=biases is not None,
        tile_rows=_tile_rows(tile_rows, x_sorted.shape[0], slot_of_group.shape[0]),
        target=target or default_target(),
    )
    backend = choose_backend(problem, implementation)
    out = jnp.zeros_like(x_sorted) if out is None else jnp.asarray(out)
    if problem.rows == 0 or problem.groups == 0:
        return out
    return differentiable_ffn(backend, problem, x_sorted, held, biases, slot_of_group, group_sizes, out)


def slot_grouped_matmul(
    x_sorted: Float[Array | np.ndarray, "M C"],
    pool: Shaped[Array | np.ndarray, "..."],
    slot_of_group: Int32[Array | np.ndarray, "..."],
    group_sizes: Int32[Array | np.ndarray, "..."] | None,
    *,
    transposed: bool = False,
    tile_rows: int | None = None,
    out: Float[Array | np.ndarray, "M N"] | None = None,
    implementation: str | None = None,
    target: Target | None = None,
    checked: bool = False,
) -> Float[Array, "M N"]:
    """Each row times its group's matrix, read in place from a pool of matrices: the matmul under `grouped_ffn`.

    Args:
      x_sorted: rows, bfloat16, float16 or float32, sorted by group.
      pool: `[S, C, N]` matrices of x's dtype or its bits; `[S, N, C]` with `transposed`.
      slot_of_group, group_sizes, tile_rows, out, implementation, target, checked: as of `grouped_ffn`; the result has
        the dtype of `out`.

    Raises:
      ValueError: shapes, dtypes, sizes or names that do not fit; the message has the values.
      NotImplementedError: the named backend cannot run this; the message says why.
    """
    check_groups(x_sorted.shape[0], pool.shape[0], slot_of_group, group_sizes, checked=checked)
    x_sorted, slot_of_group, pool = jnp.asarray(x_sorted), jnp.asarray(slot_of_group), jnp.asarray(pool)
    group_sizes = None if group_sizes is None else jnp.asarray(group_sizes)
    check_pool(pool, x_sorted.dtype)
    contract, width = x_sorted.shape[1], pool.shape[-2 if transposed else -1]
    if pool.ndim != 3 or pool.shape[-1 if transposed else -2] != contract:
        wanted = f"[S, N, {contract}]" if transposed else f"[S, {contract}, N]"
        raise ValueError(f"pool must be {wanted}, got {pool.shape}")
    problem = Problem(
        rows=x_sorted.shape[0],
        groups=slot_of_group.shape[0],
        slots=pool.shape[0],
        contract=contract,
        width=width,
        dtype=np.dtype(x_sorted.dtype),
        tile_rows=_tile_rows(tile_rows, x_sorted.shape[0], slot_of_group.shape[0]),
        target=target or default_target(),
    )
    backend = choose_backend(problem, implementation)
    out = jnp.zeros((x_sorted.shape[0], width), x_sorted.dtype) if out is None else jnp.asarray(out)
    if problem.rows == 0 or problem.groups == 0:
        return out
    return differentiable_matmul(backend, problem, transposed, x_sorted, pool[:, None], slot_of_group, group_sizes, out)


def _tile_rows(given: int | None, rows: int, groups: int) -> int:
    if given is None:
        return fitting_tile_rows(rows, groups)
    if given < 1:
        raise ValueError(f"tile_rows must be positive, got {given}")
    return given
