"""Arrays in pinned host memory as stacks of blocks, one of which at a time is on the device.

A block is the last three axes, `[3, F, D]` of an expert; the axes before count blocks. Inside jit, `fetch` compiles for
CUDA to an asynchronous slice of the host array and `write` to an update in place; arithmetic on a host array itself
would become a slow computation on the host.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

_BLOCK_AXES = 3


def blocks_of(shape: tuple[int, ...]) -> int:
    """How many blocks an array of that shape holds."""
    return math.prod(shape[:-_BLOCK_AXES])


def fetch(stack: Shaped[Array, "*blocks P F D"], place: Int32[Array, ""] | int) -> Shaped[Array, "P F D"]:
    """Block number `place` of a host array, on the device."""
    block = stack.shape[-_BLOCK_AXES:]
    sizes = (1,) * (stack.ndim - _BLOCK_AXES) + block
    sliced = jax.lax.dynamic_slice(stack, _start(stack, place), sizes)
    return jax.device_put(sliced, jax.memory.Space.Device).reshape(block)


def write(
    stack: Shaped[Array, "*blocks P F D"], block: Shaped[Array, "P F D"], place: Int32[Array, ""] | int
) -> Shaped[Array, "*blocks P F D"]:
    """The host array with a block from the device, rounded to the array's dtype, as number `place`."""
    block = block.astype(stack.dtype).reshape((1,) * (stack.ndim - _BLOCK_AXES) + block.shape)
    return jax.lax.dynamic_update_slice(stack, jax.device_put(block, jax.memory.Space.Host), _start(stack, place))


def uninitialised(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Shaped[Array, "*blocks P F D"]:
    """A host array that `write` must fill; zeros would be made on the device and copied whole."""
    return jax.device_put(jax.lax.empty(shape, dtype), jax.memory.Space.Host)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal_blocks(
    key: jax.Array, *, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> Float[Array, "E P F D"]:
    """Random expert blocks `[E, 3, F, D]` of variance 1 / fan-in in host memory, made one at a time."""
    _, _, width, hidden = shape
    deviation = jnp.array([hidden, hidden, width], jnp.float32)[:, None, None] ** -0.5

    def make(_: None, key: jax.Array) -> tuple[None, jax.Array]:
        block = deviation * jax.random.normal(key, shape[1:], jnp.float32)
        return None, jax.device_put(block.astype(dtype), jax.memory.Space.Host)

    return jax.lax.scan(make, None, jax.random.split(key, shape[0]))[1]


def _start(stack: jax.Array, place: jax.Array | int) -> tuple[jax.Array | int, ...]:
    index = jnp.unravel_index(jnp.asarray(place, jnp.int32), stack.shape[:-_BLOCK_AXES]) if stack.ndim > 3 else ()
    return (*index, *(jnp.zeros((), jnp.int32),) * _BLOCK_AXES)
