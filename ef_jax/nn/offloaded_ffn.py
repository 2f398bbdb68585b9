"""Experts that stay in host memory while one jitted program runs them: blocks come in waves through a small pool.

Half of the slots hold the wave that computes, the blocks of the next wave arrive meanwhile. Rows are sorted by expert,
so a wave's rows lie together; its experts are the next ones that have rows at all. The first wave is the one that may
be short: nothing runs that could hide its copies, so a loop fetches just what it needs, and all later waves are full.
So no block is fetched that no row uses, and none twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from ef_jax.nn import host_blocks
from pallas_kernels import Target, grouped_ffn, storage_dtype, to_storage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """How experts are run from host memory.

    Attributes:
      wave: blocks that compute at a time.
      activation, tile_rows, implementation, target: as of `pallas_kernels.grouped_ffn`.
    """

    wave: int
    activation: str
    tile_rows: int
    implementation: str | None
    target: Target | None


class _Plan(NamedTuple):
    """Experts in the order of the waves, those without rows last; `first` of them in the first of `waves` waves."""

    experts: Int32[Array, " E"]
    sizes: Int32[Array, " E"]
    starts: Int32[Array, " E"]
    used: Int32[Array, ""]
    first: Int32[Array, ""]
    waves: Int32[Array, ""]


class _Wave(NamedTuple):
    """Experts of the W slots, and the rows before the wave's and of each of them; 0 for those that are not in it."""

    experts: Int32[Array, " W"]
    sizes: Int32[Array, " groups"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def offloaded_ffn(
    how: Streaming, x: Float[Array, "M D"], experts: Float[Array, "E three F D"], sizes: Int32[Array, " E"]
) -> Float[Array, "M D"]:
    """`grouped_ffn` of rows sorted by expert, with the blocks in host memory.

    Args:
      how: static.
      x: rows on the device.
      experts: blocks in host memory, of x's dtype.
      sizes: rows of each expert, on the device; rows past the last come out as zeros.

    Returns:
      `[M, D]`; the gradient of `experts` is in host memory too.
    """
    dtype = storage_dtype(x.dtype)

    def run(pool: jax.Array, wave: _Wave, out: jax.Array) -> jax.Array:
        return _grouped(how, x, pool, wave.sizes, out)

    return _stream(how, _plan(how, sizes), experts, dtype, run, jnp.zeros_like(x))


def _forward(how: Streaming, x: Any, experts: Any, sizes: Any) -> tuple[jax.Array, Any]:
    # Whether the experts are trained is static, and what is kept must be a tree of arrays: an empty one means no.
    trained = {} if not experts.perturbed else {"experts": experts.value}
    return offloaded_ffn(how, x.value, experts.value, sizes.value), (x.value, experts.value, sizes.value, trained)


def _backward(how: Streaming, kept: Any, dy: Any) -> tuple[Any, Any, None]:
    x, experts, sizes, trained = kept
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    plan = _plan(how, sizes)

    def run(pool: jax.Array, wave: _Wave, sums: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        dx, gradients = sums
        if not trained:
            (more,) = jax.vjp(lambda x: _grouped(how, x, pool, wave.sizes), x)[1](dy)
            return dx + more, None
        more, blocks = jax.vjp(lambda x, pool: _grouped(how, x, pool, wave.sizes), x, pool)[1](dy)
        # A short first wave writes zeros for experts that come later, or have no rows.
        for slot in range(how.wave):
            gradients = host_blocks.write(gradients, blocks[slot], wave.experts[slot])
        return dx + more, gradients

    if not trained:
        return _stream(how, plan, experts, storage_dtype(x.dtype), run, (jnp.zeros_like(x), None))[0], None, None
    gradients = host_blocks.uninitialised(experts.shape, experts.dtype)
    dx, gradients = _stream(how, plan, experts, x.dtype, run, (jnp.zeros_like(x), gradients))
    zeros = jnp.zeros(experts.shape[1:], experts.dtype)
    gradients = jax.lax.fori_loop(
        jnp.maximum(plan.used, how.wave),
        experts.shape[0],
        lambda place, gradients: host_blocks.write(gradients, zeros, plan.experts[place]),
        gradients,
    )
    return dx, gradients, None


offloaded_ffn.defvjp(_forward, _backward, symbolic_zeros=True)


def _grouped(
    how: Streaming,
    x: Float[Array, "M D"],
    pool: Shaped[Array, "W three F D"],
    sizes: Int32[Array, " groups"],
    out: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """A wave's rows; the first group is of the rows before them, and is skipped."""
    return grouped_ffn(
        x,
        pool,
        jnp.arange(-1, how.wave, dtype=jnp.int32),
        sizes,
        activation=how.activation,
        tile_rows=how.tile_rows,
        out=out,
        implementation=how.implementation,
        target=how.target,
    )


def _plan(how: Streaming, sizes: Int32[Array, " E"]) -> _Plan:
    order = jnp.argsort(sizes == 0, stable=True).astype(jnp.int32)
    used = jnp.sum(sizes > 0, dtype=jnp.int32)
    waves = jnp.maximum(1, -(-used // how.wave))
    return _Plan(order, sizes, jnp.cumsum(sizes) - sizes, used, used - (waves - 1) * how.wave, waves)


def _wave(how: Streaming, plan: _Plan, number: Int32[Array, ""] | int) -> _Wave:
    begin = jnp.where(number == 0, 0, plan.first + (number - 1) * how.wave)
    held = jnp.where(number == 0, plan.first, how.wave)
    experts = jax.lax.dynamic_slice_in_dim(plan.experts, begin, how.wave)
    sizes = jnp.where(jnp.arange(how.wave) < held, plan.sizes[experts], 0)
    return _Wave(experts, jnp.concatenate([plan.starts[experts[:1]], sizes]))


def _stream(
    how: Streaming,
    plan: _Plan,
    experts: Float[Array, "E three F D"],
    dtype: Any,
    run: Callable[[jax.Array, _Wave, Any], Any],
    carried: Any,
) -> Any:
    """`run(pool, wave, carried)` of every wave in turn, its blocks in the pool, stored as `dtype`."""

    def fetched(expert: jax.Array) -> jax.Array:
        block = host_blocks.fetch(experts, expert)
        return block if block.dtype == dtype else to_storage(block)

    def fill(slot: jax.Array, pool: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(pool, fetched(plan.experts[slot]), slot, 0)

    def step(number: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        pool, carried = state
        coming = [fetched(expert) for expert in _wave(how, plan, number + 1).experts]
        carried = run(pool, _wave(how, plan, number), carried)
        return jnp.stack(coming), carried

    with jax.named_scope("offloaded_experts"):
        pool = jax.lax.fori_loop(0, plan.first, fill, jnp.zeros((how.wave, *experts.shape[1:]), dtype))
        if how.wave < experts.shape[0]:
            pool, carried = jax.lax.fori_loop(0, plan.waves - 1, step, (pool, carried))
        return run(pool, _wave(how, plan, plan.waves - 1), carried)
