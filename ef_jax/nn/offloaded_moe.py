"""`OffloadedMoE`: a Mixture-of-Experts layer for any model, its experts in pinned host memory."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from ef_jax.errors import InputError
from ef_jax.nn.host_blocks import normal_blocks
from ef_jax.nn.host_param import HostParam, host_sharding, in_host_memory
from ef_jax.nn.offloaded_ffn import Streaming, offloaded_ffn
from ef_jax.nn.router import Router
from ef_jax.nn.sorted_rows import combine, expert_order
from ef_jax.spec import RouterSpec
from pallas_kernels import ACTIVATIONS, Target
from pallas_kernels.grouped_ffn.problem import fitting_tile_rows

# Calls outside jit then compile once for a shape, not one loop after another each time.
_offloaded_ffn = jax.jit(offloaded_ffn, static_argnums=0)


class OffloadedMoE(nnx.Module):
    """Routes each token to K of E gated networks whose weights stay in host memory.

    A call copies the blocks of the experts that its tokens chose to the device, each once, while those that are there
    compute; the backward pass does so again, and leaves the experts' gradients in host memory. All of it is one
    traceable function: it works in `jax.jit`, `nnx.jit`, `jax.grad` and `jax.lax.scan`. What a token gets depends
    neither on `slots` nor, for a given `tile_rows`, on the other tokens.

    Args:
      hidden: D.
      width: F.
      experts: E.
      top_k: K.
      slots: expert blocks on the device at once, an even number from 2 on: half of them compute while the other half
        arrive. On CUDA more than 4 hide no more of the copies, since XLA lets two run beside the compute (its flag
        xla_gpu_experimental_parallel_async_compute_limit). With 2 x `experts` a call first fetches all that it needs.
      router: which experts, with which weights.
      activation: a key of `pallas_kernels.ACTIVATIONS`.
      dtype: of parameters, input and output.
      tile_rows: height of the kernels' tiles; None: what fits the tokens of a call.
      implementation: the kernels' backend; None: the first that runs.
      target: what to build for; None: jax's default device.
      rngs: `params` for the initial weights.

    Attributes:
      router: the `Router`, on the device.
      experts: `HostParam` `[E, 3, F, D]`: gate, up and transposed down.

    Raises:
      InputError: a size, a name or a number of slots that cannot be.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        experts: int,
        top_k: int,
        slots: int = 4,
        router: RouterSpec | None = None,
        activation: str = "silu",
        dtype: jax.typing.DTypeLike = jnp.float32,
        tile_rows: int | None = None,
        implementation: str | None = None,
        target: Target | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in {"hidden": hidden, "width": width, "experts": experts, "tile_rows": tile_rows}.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, got {value}")
        if not 0 < top_k <= experts:
            raise InputError(f"top_k must be between 1 and the {experts} experts, got {top_k}")
        if slots < 2 or slots % 2:
            raise InputError(f"slots must be even, half of them to compute while the others arrive, got {slots}")
        if activation not in ACTIVATIONS:
            raise InputError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.slots, self.activation = slots, activation
        self.tile_rows, self.implementation, self.target = tile_rows, implementation, target
        self.router = Router(
            router or RouterSpec(), hidden=hidden, experts=experts, top_k=top_k, dtype=dtype, rngs=rngs
        )
        shape = (experts, 3, width, hidden)
        self.experts = HostParam(normal_blocks(rngs.params(), shape=shape, dtype=jnp.dtype(dtype)))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The weighted sum of each token's experts, in x's dtype."""
        with jax.named_scope("route"):
            ids, weights = self.router(x)
        return self.run(x, ids, weights)

    def run(
        self, x: Float[Array, "*rows D"], ids: Int32[Array, "*rows K"], weights: Float[Array, "*rows K"]
    ) -> Float[Array, "*rows D"]:
        """The same for experts chosen elsewhere; -1 stands for none, and weights are then to be 0."""
        blocks = self.experts.get_value()
        if x.shape[-1] != blocks.shape[-1] or x.dtype != blocks.dtype:
            raise InputError(
                f"x must be {blocks.dtype} of {blocks.shape[-1]} columns as the experts are, got {x.dtype}{[*x.shape]}"
            )
        if not in_host_memory(blocks):
            raise InputError(
                f"the experts are {jax.typeof(blocks).str_short()}, not in host memory: put them there by "
                "jax.device_put(experts, ef_jax.nn.host_sharding()), or ef_jax.nn.restore if a checkpoint gave them"
            )
        experts = blocks.shape[0]
        order, sizes = expert_order(ids, experts)
        # Repeated and then permuted, not gathered by token: the gradient is then a sum in a fixed order, not a scatter.
        repeated = jnp.broadcast_to(x[..., None, :], (*ids.shape, x.shape[-1])).reshape(-1, x.shape[-1])
        rows = repeated.at[order].get(unique_indices=True, mode="promise_in_bounds")
        how = Streaming(
            wave=min(self.slots // 2, experts),
            activation=self.activation,
            tile_rows=self.tile_rows or fitting_tile_rows(order.shape[0], experts),
            implementation=self.implementation,
            target=self.target,
        )
        return combine(_offloaded_ffn(how, rows, blocks, sizes), order, weights)

    @classmethod
    def from_dense(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        router_weight: Any,
        *,
        layout: Literal["in_out", "out_in"],
        top_k: int,
        slots: int = 4,
        router_bias: Any = None,
        select_bias: Any = None,
        router: RouterSpec | None = None,
        **options: Any,
    ) -> "OffloadedMoE":
        """A layer with the weights of a stacked dense MoE, which may lie anywhere; they are copied one by one.

        Args:
          gate, up: `[E, D, F]` with layout "in_out" (`x @ w`, as most JAX code has it), `[E, F, D]` with "out_in" (as
            torch has it). Their dtype becomes the layer's.
          down: `[E, F, D]` with "in_out", `[E, D, F]` with "out_in".
          router_weight: `[E, D]`, or `[D, E]` with "in_out".
          layout: order of the axes.
          top_k, slots, router, options: as of the class.
          router_bias, select_bias: `[E]`, where the router's spec has them.

        Raises:
          InputError: shapes or a layout that do not fit, or a bias that the spec has not.
        """
        if layout not in ("in_out", "out_in"):
            raise InputError(f"layout must be 'in_out' or 'out_in', got {layout!r}")
        turned = layout == "in_out"
        axes = "[E, D, F]" if turned else "[E, F, D]"
        if len(gate.shape) != 3:
            raise InputError(f"gate must be {axes}, got {gate.shape}")
        experts, width, hidden = (gate.shape[0], *gate.shape[:0:-1]) if turned else gate.shape
        spec = router or RouterSpec()
        wanted = {
            "gate": (gate, gate.shape, True),
            "up": (up, gate.shape, True),
            "down": (down, (experts, *gate.shape[:0:-1]), True),
            "router_weight": (router_weight, (hidden, experts) if turned else (experts, hidden), True),
            "router_bias": (router_bias, (experts,), spec.bias),
            "select_bias": (select_bias, (experts,), spec.select_bias),
        }
        for name, (array, shape, needed) in wanted.items():
            if (array is not None) != needed:
                raise InputError(f"{name} is {'missing' if needed else 'given, but the router has none'}")
            if array is not None and tuple(array.shape) != shape:
                raise InputError(f"{name} must be {[*shape]} as gate is {axes}, got {[*array.shape]}")
        layer = nnx.eval_shape(
            lambda: cls(
                hidden,
                width,
                experts=experts,
                top_k=top_k,
                slots=slots,
                router=spec,
                dtype=gate.dtype,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
        blocks = np.empty((experts, 3, width, hidden), gate.dtype)
        for expert, block in enumerate(blocks):
            for part, weights in enumerate((gate, up, down)):
                matrix = np.asarray(weights[expert])
                block[part] = matrix.T if turned == (part < 2) else matrix
        layer.experts.set_value(jax.device_put(blocks, host_sharding()))
        layer.router.weight.set_value(jnp.asarray(router_weight.T if turned else router_weight, gate.dtype))
        if layer.router.bias is not None:
            layer.router.bias.set_value(jnp.asarray(router_bias, gate.dtype))
        if layer.router.select_bias is not None:
            layer.router.select_bias.set_value(jnp.asarray(select_bias, jnp.float32))
        return layer
