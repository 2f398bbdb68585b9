"""What both transports of the exchange ask of routes: which device serves what, and small arrays gathered as one.

Everything here runs inside `shard_map` over the axes of `mesh/layout.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def owner() -> Int32[Array, ""]:
    """This device's place in its group."""
    return jax.lax.axis_index("expert") * jax.lax.axis_size("tensor") + jax.lax.axis_index("tensor")


def servers(ids: Int32[Array, "X *rows"], serves: Int32[Array, "X E"]) -> Int32[Array, "X *rows"]:
    """Owner number of the device that computes each expert of the tokens of each source; -1 where there is none."""
    source = jnp.arange(ids.shape[0]).reshape(-1, *[1] * (ids.ndim - 1))
    return jnp.where(ids < 0, -1, serves[source, jnp.maximum(ids, 0)])


Run = Callable[[Callable[[Any], Any], Any], Any]
"""Runs the collective that moves rows, a function, on what it takes: by itself, or beside something else."""


def alone(collective: Callable[[Any], Any], given: Any) -> Any:
    """The `Run` of a collective by itself."""
    return collective(given)


def gather(parts: Sequence[Shaped[Array, "B T _"]], run: Run = alone) -> list[Shaped[Array, "X B T _"]]:
    """Arrays of all sources along `expert`, by one collective: as bits, side by side."""
    if jax.lax.axis_size("expert") == 1:
        return [part[None] for part in parts]
    bits = [_bits(part) for part in parts]
    whole = run(lambda bits: jax.lax.all_gather(bits, "expert", axis=0), jnp.concatenate(bits, axis=-1))
    gathered, start = [], 0
    for part, of_part in zip(parts, bits, strict=True):
        gathered.append(_from_bits(whole[..., start : start + of_part.shape[-1]], part.dtype))
        start += of_part.shape[-1]
    return gathered


def share(rows: Shaped[Array, "M D"], server: Int32[Array, " M"]) -> Shaped[Array, "M D"]:
    """Rows that devices along `tensor` have for one another's sequences, which are the same: each from its server."""
    if (size := jax.lax.axis_size("tensor")) == 1:
        return rows
    return jax.lax.all_gather(rows, "tensor", axis=0)[server % size, jnp.arange(len(rows))]


def _bits(array: Shaped[Array, "*rows n"]) -> Shaped[Array, "*rows m"]:
    bits = jax.lax.bitcast_convert_type(array, jnp.uint16)  # 32 bits are two, in a last axis of their own
    return bits.reshape(*array.shape[:-1], -1)


def _from_bits(bits: Shaped[Array, "*rows m"], dtype: jnp.dtype) -> Shaped[Array, "*rows n"]:
    if (halves := jnp.dtype(dtype).itemsize // 2) > 1:
        bits = bits.reshape(*bits.shape[:-1], -1, halves)
    return jax.lax.bitcast_convert_type(bits, dtype)
