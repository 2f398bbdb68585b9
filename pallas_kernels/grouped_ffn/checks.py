"""What can be said against arguments before anything runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from pallas_kernels.grouped_ffn.quantized import QuantizedPool, check_quantized
from pallas_kernels.grouped_ffn.storage import storage_dtype


def check_pool(pool: Any, dtype: Any) -> None:
    """Refuses a pool that does not hold weights for rows of `dtype`.

    Raises:
      ValueError: naming the dtypes, or what is wrong with a quantized pool.
    """
    if isinstance(pool, QuantizedPool):
        check_quantized(pool)
    elif pool.dtype not in (dtype, storage_dtype(dtype)):
        raise ValueError(f"pool of {pool.dtype} does not hold weights for rows of {dtype}")


def check_groups(rows: int, slots: int, slot_of_group: Any, group_sizes: Any, *, checked: bool) -> None:
    """Refuses groups that do not fit the rows or the pool; see `grouped_ffn` for when their values are looked at.

    Raises:
      ValueError: naming the shapes, sizes or slots.
    """
    sizes_shape = (rows,) if group_sizes is None else group_sizes.shape
    if len(slot_of_group.shape) != 1 or slot_of_group.shape != sizes_shape:
        raise ValueError(f"slot_of_group {slot_of_group.shape} and group_sizes {sizes_shape} must be equal")
    if _known(slot_of_group, checked):
        host = np.asarray(slot_of_group)
        if (wrong := (host < -1) | (host >= slots)).any():
            raise ValueError(f"slot_of_group has {host[wrong][0]}, the pool has slots 0 to {slots - 1}; -1 skips")
    elif checked:
        inside = jnp.all((slot_of_group >= -1) & (slot_of_group < slots))
        checkify.check(inside, f"slot_of_group must be from -1 to {slots - 1}: {{}}", slot_of_group)
    if group_sizes is None:
        return
    if _known(group_sizes, checked):
        host = np.asarray(group_sizes)
        if (host < 0).any() or host.sum(dtype=np.int64) > rows:
            raise ValueError(f"group_sizes must be at least 0 and sum to at most {rows}, got {host.tolist()}")
    elif checked:
        fits = jnp.all(group_sizes >= 0) & (jnp.sum(group_sizes) <= rows)
        checkify.check(fits, f"group_sizes must be at least 0 and sum to at most {rows}: {{}}", group_sizes)


def _known(array: Any, checked: bool) -> bool:
    return isinstance(array, np.ndarray) or (checked and not isinstance(array, jax.core.Tracer))
