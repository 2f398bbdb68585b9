"""The public function and the table of its backends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS
from pallas_kernels.grouped_ffn.reference import grouped_ffn_reference
from pallas_kernels.grouped_ffn.storage import storage_dtype
from pallas_kernels.grouped_ffn.xla import grouped_ffn_xla

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "xla": grouped_ffn_xla,
    "reference": grouped_ffn_reference,
}


def choose_backend(implementation: str | None) -> str:
    """Name of the backend that runs for `implementation`; None takes the first of `BACKENDS`.

    Raises:
      ValueError: no backend has that name.
    """
    if implementation is None:
        return next(iter(BACKENDS))
    if implementation not in BACKENDS:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(BACKENDS)}")
    return implementation


def grouped_ffn(
    x_sorted: Float[Array | np.ndarray, "M D"],
    pool: Shaped[Array | np.ndarray, "..."],
    slot_of_group: Int32[Array | np.ndarray, "..."],
    group_sizes: Int32[Array | np.ndarray, "..."] | None,
    *,
    activation: str = "silu",
    tile_rows: int = 8,
    out: Float[Array | np.ndarray, "M D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """`down(act(gate(x)) * up(x))` of each row with its group's expert block, read in place from the pool.

    Rows are sorted by group: the first `group_sizes[0]` belong to group 0, and so on. A row's result depends on the
    row, its block and its rank within its group only, not on other rows or on which groups are skipped.

    Args:
      x_sorted: rows, bfloat16, float16 or float32.
      pool: `[S, 3, F, D]` expert blocks (gate, up, transposed down), of x's dtype or its bits (`storage_dtype`).
      slot_of_group: `[G]`, slot of each group's block; -1 skips the group.
      group_sizes: `[G]`, rows of each group; they sum to at most M. None: M groups of one row each, which saves the
        sums over groups.
      activation: of the gate, a key of `ACTIVATIONS`.
      tile_rows: height of a tile; part of the result's rounding, so keep it fixed.
      out: what rows of skipped groups, and rows past the last group, hold afterwards; zeros where None.
      implementation: a backend's name, or None for the default of this platform.

    Returns:
      `[M, D]` in x's dtype; accumulation is f32, the inner activation is rounded to x's dtype.

    Raises:
      ValueError: shapes, dtypes or names that do not fit; the message has the values.
    """
    x_sorted, pool = jnp.asarray(x_sorted), jnp.asarray(pool)
    slot_of_group = jnp.asarray(slot_of_group)
    group_sizes = None if group_sizes is None else jnp.asarray(group_sizes)
    if pool.ndim != 4 or pool.shape[1] != 3 or pool.shape[3] != x_sorted.shape[1]:
        raise ValueError(f"pool must be [S, 3, F, {x_sorted.shape[1]}], got {pool.shape}")
    if pool.dtype not in (x_sorted.dtype, storage_dtype(x_sorted.dtype)):
        raise ValueError(f"pool of {pool.dtype} does not hold weights for rows of {x_sorted.dtype}")
    sizes_shape = x_sorted.shape[:1] if group_sizes is None else group_sizes.shape
    if slot_of_group.shape != sizes_shape:
        raise ValueError(f"slot_of_group {slot_of_group.shape} and group_sizes {sizes_shape} must be equal")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be positive, got {tile_rows}")
    out = jnp.zeros_like(x_sorted) if out is None else jnp.asarray(out)
    run = BACKENDS[choose_backend(implementation)]
    return run(x_sorted, pool, slot_of_group, group_sizes, out, activation=activation, tile_rows=tile_rows)
