"""`OffloadedMoE` compiles for an H100: experts stay host bytes, and their blocks arrive beside the compute."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from ef_jax.nn import HostParam, OffloadedMoE, host_optimizer
from pallas_kernels import target_of
from tests.cuda import aot

pytestmark = [
    pytest.mark.cuda_compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

E, D, F, TOKENS = 16, 512, 256, 64
BLOCK = 3 * D * F * 2
STACK = E * BLOCK


def layer_and_state(implementation: str) -> tuple[Any, Any]:
    target = target_of(aot.h100())
    layer = nnx.eval_shape(
        lambda: OffloadedMoE(
            D,
            F,
            experts=E,
            top_k=2,
            slots=4,
            dtype=jnp.bfloat16,
            implementation=implementation,
            target=target,
            rngs=nnx.Rngs(0),
        )
    )
    graphdef, state = nnx.split(layer)
    flat = [
        (path, variable.replace(aot.abstract(value.shape, value.dtype, kind)))
        for path, variable in nnx.to_flat_state(state)
        for value in [variable.get_value()]
        for kind in ["pinned_host" if isinstance(variable, HostParam) else "device"]
    ]
    return graphdef, nnx.from_flat_state(flat)


def blocks_in_flight(hlo: str) -> int:
    """The most copies of blocks that are under way while a kernel runs, as the program is scheduled."""
    flying = most = 0
    for line in hlo.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if name.startswith("%dynamic-slice-start"):
            flying += 1
        elif name.startswith("%dynamic-slice-done"):
            flying -= 1
        elif " custom-call(" in rest and ("triton" in rest or "mosaic" in rest):
            most = max(most, flying)
    return most


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_forward_and_backward_keep_the_experts_on_the_host(implementation: str) -> None:
    graphdef, state = layer_and_state(implementation)
    x = aot.abstract((TOKENS, D), jnp.bfloat16)

    def forward(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x)

    def loss(state: Any, x: jax.Array) -> jax.Array:
        return forward(state, x).astype(jnp.float32).sum()

    compiled = aot.compile_for_h100(forward, state, x)
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes == STACK
    assert memory.temp_size_in_bytes < 4 * BLOCK + 12 * TOKENS * D * 4  # the slots, and some rows
    assert blocks_in_flight(compiled.as_text()) == 2

    memory = aot.compile_for_h100(jax.grad(loss), state, x).memory_analysis()
    assert memory.host_argument_size_in_bytes == memory.host_output_size_in_bytes == STACK
    assert memory.temp_size_in_bytes < 11 * BLOCK + 24 * TOKENS * max(D, F) * 4
    assert memory.temp_size_in_bytes < STACK


def test_an_optimizers_step_updates_host_memory_in_place() -> None:
    tx = optax.adam(1e-3)
    params = aot.abstract((E, 3, F, D), jnp.bfloat16, "pinned_host")
    one = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((3, F, D), jnp.bfloat16))
    states = jax.tree.map(
        lambda leaf: aot.abstract((E, *leaf.shape), leaf.dtype, "pinned_host" if leaf.ndim else "device"), one
    )
    memory = aot.compile_for_h100(
        lambda params, gradients, states: host_optimizer.update_blocks(tx, params, gradients, states),
        params,
        params,
        states,
        donate_argnums=(0, 2),
    ).memory_analysis()
    assert memory.host_argument_size_in_bytes == 4 * STACK
    assert memory.host_alias_size_in_bytes == memory.host_output_size_in_bytes == 3 * STACK
    assert memory.temp_size_in_bytes < 8 * BLOCK
