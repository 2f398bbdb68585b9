"""Flax variables that live in the host's pinned memory, and how they are restored there."""

from typing import Any, TypeVar

import jax
from flax import nnx

from pallas_kernels import default_device

_Value = TypeVar("_Value")


class HostVariable(nnx.Variable[_Value]):
    """An array in pinned host memory."""


class HostParam(HostVariable[_Value]):
    """A trainable array in pinned host memory.

    It is no `nnx.Param`, so that `nnx.split(model, HostParam, ...)` keeps these arrays apart and no optimizer takes
    them for arrays that it can compute with where they lie: see `HostOptimizer`.
    """


TRAINABLE = nnx.Any(nnx.Param, HostParam)
"""Filter of all parameters: `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINABLE))`."""


def host_sharding(device: jax.Device | None = None) -> jax.sharding.SingleDeviceSharding:
    """Pinned host memory of a device; of jax's default device where None."""
    return jax.sharding.SingleDeviceSharding(device or default_device(), memory_kind="pinned_host")


def restore_target(model: Any, device: jax.Device | None = None) -> Any:
    """What a checkpoint library restores a state by, so that every array lands in its own memory.

        from orbax.checkpoint.experimental import v1 as ocp

        ocp.save(path, nnx.to_pure_dict(nnx.state(model)))
        restore(model, ocp.load(path, restore_target(model)))

    Args:
      model: a module, perhaps abstract (`nnx.eval_shape`), an optimizer, or an `nnx.State`. No array is read.
      device: where the arrays go; jax's default device where None.

    Returns:
      Nested dicts of `jax.ShapeDtypeStruct`: `HostVariable`s in pinned host memory, everything else on the device.
    """
    on_device = jax.sharding.SingleDeviceSharding(device or default_device())
    in_host = host_sharding(device)
    state = model if isinstance(model, nnx.State) else nnx.state(model)

    def target(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        sharding = in_host if isinstance(variable, HostVariable) else on_device
        value = variable.get_value()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return nnx.to_pure_dict(state, extract_fn=target)


def restore(model: Any, arrays: Any) -> None:
    """Puts restored arrays into a model, or whatever `restore_target` was asked about.

    Arrays that a checkpoint library has put together lie in pinned host memory where `restore_target` said so, but
    jax's type of them does not say it, and compiled programs would take them for arrays on the device. They are
    copied once, one by one, within host memory.
    """

    def typed(array: jax.Array) -> jax.Array:
        lost = array.sharding.memory_kind == "pinned_host" and not in_host_memory(array)
        return jax.device_put(array, jax.memory.Space.Host) if lost else array

    nnx.update(model, jax.tree.map(typed, arrays))


def in_host_memory(array: jax.Array) -> bool:
    """Whether programs take the array, or what is traced as it, as one in host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host
