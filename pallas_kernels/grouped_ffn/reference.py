"""The reference backend: every row against its own expert block, in f32. Slow, plain, the meaning of the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.grouped_ffn.activations import ACTIVATIONS
from pallas_kernels.grouped_ffn.storage import from_storage


def grouped_ffn_reference(
    x_sorted: Float[Array, "M D"],
    pool: Shaped[Array, "S 3 F D"],
    slot_of_group: Int32[Array, "G"],
    group_sizes: Int32[Array, "G"] | None,
    out: Float[Array, "M D"],
    *,
    activation: str,
    tile_rows: int,
) -> Float[Array, "M D"]:
    """`grouped_ffn` one row at a time; see `api.grouped_ffn`. `tile_rows` has no effect: no row sees another."""
    del tile_rows
    act = ACTIVATIONS[activation]
    ends = jnp.cumsum(jnp.ones_like(slot_of_group) if group_sizes is None else group_sizes)

    def one_row(row: jax.Array, x: jax.Array, before: jax.Array) -> jax.Array:
        group = jnp.searchsorted(ends, row, side="right")
        slot = jnp.where(group < ends.shape[0], slot_of_group[jnp.minimum(group, ends.shape[0] - 1)], -1)
        block = from_storage(pool[jnp.maximum(slot, 0)], x.dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        highest = jax.lax.Precision.HIGHEST
        gate = jnp.dot(block[0], wide, precision=highest)
        up = jnp.dot(block[1], wide, precision=highest)
        y = jnp.dot(act(gate) * up, block[2], precision=highest)
        return jnp.where(slot >= 0, y.astype(x.dtype), before)

    rows = jnp.arange(x_sorted.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda args: one_row(*args), (rows, x_sorted, out))
