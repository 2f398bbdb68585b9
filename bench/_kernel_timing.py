"""Time of one call of a kernel: calls in a row inside one program where dispatch would be measured instead."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from bench import _report

# Seconds of one call. The first is a warm-up, which compiles.
Turn = Callable[[], float]

_CALLS_ON_DEVICE = 20


def in_a_row(function: Callable[..., jax.Array], arguments: Sequence[jax.Array]) -> Turn:
    """Times `function(*arguments)`: on a CPU by itself, elsewhere as many calls in one program, each after the last."""
    calls = 1 if jax.default_backend() == "cpu" else _CALLS_ON_DEVICE

    @jax.jit
    def chain(first: jax.Array, *others: jax.Array) -> jax.Array:
        # A value of each result goes into the next call, else calls would be hoisted out of the loop or removed.
        def body(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            first, result = carry
            first = first.at[0, 0].add(0 * result[0, 0].astype(first.dtype))
            return (first, function(first, *others)), None

        start = (first, jnp.zeros_like(jax.eval_shape(function, first, *others)))
        return jax.lax.scan(body, start, None, length=calls)[0][1]

    program = jax.jit(function) if calls == 1 else chain

    def turn() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return (time.perf_counter() - began) / calls

    return turn


def spread_of_turns(
    turns: Mapping[str, Turn], repeats: int, seconds: float = float("inf")
) -> dict[str, dict[str, float | int]]:
    """Seconds of a call by name, warm-ups left out; contenders take turns, and stop when they took `seconds` in all."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    for _ in range(repeats):
        for name, turn in turns.items():
            if not samples[name] or sum(samples[name]) < seconds:
                samples[name].append(turn())
    return {name: _report.spread(taken) for name, taken in samples.items()}
