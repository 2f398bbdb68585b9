"""An optimizer for models with `HostParam`s, whose gradients and moments stay in host memory too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ef_jax.nn.host_blocks import blocks_of, fetch, write
from ef_jax.nn.host_param import TRAINABLE, HostParam, HostVariable


class HostMoment(HostVariable):
    """That part of an optimizer's state which is as large as the parameters."""


class HostOptimizer(nnx.Module):
    """Updates a model's parameters by an optax transformation, those in host memory block by block.

    Parameters on the device are updated together, as by `nnx.Optimizer`. Blocks in host memory come to the device one
    after another, each with its gradient and moments, and go back, so that the device holds a few blocks whatever the
    model's size. The transformation must therefore treat parameters apart, as sgd, adam, adamw and lion do; clipping
    by the global norm would see one block at a time.

        optimizer = HostOptimizer(model, optax.adamw(1e-3))
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, TRAINABLE))(model, batch)
        optimizer.update(model, grads)

    An update makes new arrays in host memory, unless the model and the optimizer are donated to the program that it is
    part of: `nnx.jit(train_step, donate_argnums=(0, 1))` updates them in place.

    Args:
      model: whose parameters.
      tx: an `optax.GradientTransformation`.
      wrt: filter of the parameters to update, and of the gradients that `update` is given.
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any = TRAINABLE):
        self.tx, self.wrt = tx, wrt
        self.on_device = nnx.Optimizer(model, tx, wrt=nnx.All(wrt, nnx.Not(HostParam)))
        states = jax.tree.map(lambda param: _initial(tx, param), self._in_host(model))
        self.states = nnx.data(jax.tree.map(_variable, states))

    def update(self, model: Any, grads: Any) -> None:
        """One step along the gradients that `nnx.grad` gave for `nnx.DiffState(0, wrt)`."""
        self.on_device.update(model, grads)
        params, gradients = self._in_host(model), self._in_host(grads)
        updated = jax.tree.map(functools.partial(update_blocks, self.tx), params, gradients, nnx.as_pure(self.states))
        nnx.update(model, jax.tree.map(lambda _, both: both[0], params, updated))
        nnx.update(self.states, nnx.state(jax.tree.map(lambda _, both: both[1], params, updated)))

    def _in_host(self, model: Any) -> Any:
        return nnx.as_pure(nnx.state(model, nnx.All(self.wrt, HostParam)))


def _initial(tx: Any, params: jax.Array) -> Any:
    """The states of every block: stacks in host memory where they are blocks themselves, else on the device."""

    def one(_: None, place: jax.Array) -> tuple[None, Any]:
        return None, jax.tree.map(settle, tx.init(fetch(params, place)))

    def settle(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, jax.memory.Space.Host) if leaf.ndim else leaf

    return jax.jit(lambda params: jax.lax.scan(one, None, jnp.arange(blocks_of(params.shape)))[1])(params)


def _variable(leaf: jax.Array) -> Any:
    return HostMoment(leaf) if leaf.ndim > 1 else nnx.OptState(leaf)


@functools.partial(jax.jit, static_argnums=0)
def update_blocks(
    tx: Any, params: Float[Array, "*blocks P F D"], gradients: Float[Array, "*blocks P F D"], states: Any
) -> tuple[Float[Array, "*blocks P F D"], Any]:
    """One step of `tx` on every block: parameters and states, which are stacks a block or, per block, scalars."""

    def one(place: jax.Array, stacks: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        params, states = stacks
        block = fetch(params, place)
        state = jax.tree.map(lambda stack: fetch(stack, place) if stack.ndim > 1 else stack[place], states)
        step, state = tx.update(fetch(gradients, place), state, block)
        states = jax.tree.map(
            lambda stack, new: write(stack, new, place) if stack.ndim > 1 else stack.at[place].set(new), states, state
        )
        return write(params, block + step.astype(block.dtype), place), states

    return jax.lax.fori_loop(0, blocks_of(params.shape), one, (params, states))
