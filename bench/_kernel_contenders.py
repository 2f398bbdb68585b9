"""Who is measured: our backends, `lax.ragged_dot`, a loop of dense matmuls, and other libraries where installed."""

import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bench._kernel_cases import Case
from pallas_kernels import BACKENDS, from_storage, grouped_ffn

# A contender's program and its arguments, the rows first; NotImplementedError says why there is none.
Prepared = tuple[Callable[..., jax.Array], Sequence[jax.Array]]
Prepare = Callable[[Case], Prepared]

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_ROWS_OF_REFERENCE = 64
_OPTIONAL = ("tokamax", "torch")


def contenders() -> dict[str, Prepare | None]:
    """By name; None for the one that is not a jax program (torch)."""
    ours: dict[str, Prepare | None] = {name: _backend(name) for name in BACKENDS}
    theirs: dict[str, Prepare | None] = {"ragged_dot": _ragged_dot, "dense_loop": _dense_loop, "tokamax": _tokamax}
    return ours | {
        name: prepare
        for name, prepare in (theirs | {"torch": None}).items()
        if name not in _OPTIONAL or importlib.util.find_spec(name)
    }


def _backend(name: str) -> Prepare:
    def prepare(case: Case) -> Prepared:
        if name == "reference" and case.rows > _ROWS_OF_REFERENCE:
            raise NotImplementedError(f"it is slow, so it gets {_ROWS_OF_REFERENCE} rows at most")

        def run(x: jax.Array, pool: jax.Array, slots: jax.Array, sizes: jax.Array) -> jax.Array:
            return grouped_ffn(x, pool, slots, sizes, implementation=name)

        slots = jnp.arange(case.shape.experts, dtype=jnp.int32)
        arguments = case.x, case.weights.pool, slots, jnp.asarray(case.sizes)
        jax.eval_shape(run, *arguments)  # refuses here, if at all
        return run, arguments

    return prepare


def _gated(projected: jax.Array, dtype: np.dtype) -> jax.Array:
    gate, up = jnp.split(projected, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def _by_ragged_dot(dot: Callable[..., jax.Array]) -> Prepare:
    def prepare(case: Case) -> Prepared:
        def run(x: jax.Array, gate_up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
            inner = _gated(dot(x, gate_up, sizes, preferred_element_type=jnp.float32), case.dtype)
            return dot(inner, down, sizes, preferred_element_type=jnp.float32).astype(case.dtype)

        return run, (case.x, case.weights.gate_up, case.weights.down, jnp.asarray(case.sizes))

    return prepare


_ragged_dot = _by_ragged_dot(jax.lax.ragged_dot)


def _tokamax(case: Case) -> Prepared:
    import tokamax

    return _by_ragged_dot(tokamax.ragged_dot)(case)


def _dense_loop(case: Case) -> Prepared:
    """Matmuls of known sizes on arrays of their own: no grouped kernel has it as easy, and no model can use it."""
    busy = np.flatnonzero(case.sizes)
    ends = np.cumsum(case.sizes)

    def run(x: jax.Array, *blocks: jax.Array) -> jax.Array:
        results = []
        for expert, gate_up, down in zip(busy, blocks[::2], blocks[1::2], strict=True):
            rows = x[ends[expert] - case.sizes[expert] : ends[expert]]
            projected = jax.lax.dot_general(rows, gate_up, _CONTRACT_LAST, preferred_element_type=jnp.float32)
            inner = _gated(projected, case.dtype)
            results.append(jnp.matmul(inner, down, preferred_element_type=jnp.float32).astype(case.dtype))
        return jnp.concatenate(results)

    blocks = []
    for expert in busy:
        block = from_storage(case.weights.pool[expert], case.dtype)
        blocks += [block[:2].reshape(-1, case.shape.hidden), block[2]]
    return run, (case.x, *blocks)
