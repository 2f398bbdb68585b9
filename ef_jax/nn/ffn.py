"""Feed-forward networks over one packed block: gate, up and transposed down, `[3, F, D]`, or without the gate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ef_jax.nn.linear import MIN_ROWS, Linear, matmul_f32, normal_param
from ef_jax.nn.shares import sum_shares
from ef_jax.spec import Activation, ModelSpec

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def ffn(
    x: Float[Array, "M D"], block: Float[Array, "P F D"], activation: Activation, *, shares: int = 1
) -> Float[Array, "M D"]:
    """`down(act(gate(x)) * up(x))` in x's dtype; float32 inside, the product rounded once before `down`.

    A block of two parts has no gate: `down(act(up(x)))`. `shares`: devices with a part of F each.
    """
    rows, width = x.shape[0], block.shape[1]
    if x.dtype.itemsize == 2 and rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - rows), (0, 0)))
    projected = matmul_f32(x, block[:-1].reshape(-1, block.shape[2]))
    hidden = ACTIVATIONS[activation](projected[:, :width])
    if len(block) == 3:
        hidden = hidden * projected[:, width:]
    out = jnp.matmul(hidden.astype(x.dtype), block[-1], preferred_element_type=jnp.float32)[:rows]
    return sum_shares(out, shares).astype(x.dtype)


class GatedFFN(nnx.Module):
    """A dense layer's network or a shared expert, with a gate where the experts have one.

    `gated`: the output is scaled by a sigmoid of the input.
    """

    def __init__(self, spec: ModelSpec, width: int, *, gated: bool = False, rngs: nnx.Rngs):
        dtype = jnp.dtype(spec.dtype)
        self.activation, self.shares = spec.experts.activation, spec.tensor_shares
        self.block = normal_param((3 if spec.experts.gated else 2, width, spec.hidden), dtype, rngs)
        self.gate = Linear(spec.hidden, 1, dtype=dtype, rngs=rngs) if gated else None

    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        out = ffn(h.reshape(-1, h.shape[-1]), self.block[...], self.activation, shares=self.shares).reshape(h.shape)
        return out if self.gate is None else jax.nn.sigmoid(self.gate(h)) * out
