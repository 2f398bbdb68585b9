"""Part "single" of `bench.overhead`: a whole decode step as one jitted program, with no host in the loop."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.nn import merge_top, reach_of, top_definition
from ef_jax.runtime import steps
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.sampling import mark_seen, sample, sampling_arrays
from ef_jax.sampling_options import SamplingOptions


class SingleProgram:
    """Decodes like an all-resident engine, with its weights and pool, by one program a token.

    The program is every layer of the model unrolled, built from the engine's own functions and kernel: layers' slots
    are constants, keys and values are updated in place, and a step's token, position and step number are the next
    step's input on the device.

    Args:
      engine: all-resident, of a batch of one.
      dense: its weights.
      span: positions of the key/value caches that attention reads, as the engine's own programs do.
    """

    def __init__(self, engine: Engine, dense: DenseWeights, span: int) -> None:
        self._engine, self._dense = engine, dense
        spec = engine.spec
        slot_of = engine.residency.slot_of.copy()
        moe_index = {layer: index for index, layer in enumerate(spec.moe_layers)}

        def step(top, layers, finish, pool, sampling, tokens, state):  # type: ignore[no-untyped-def]
            ends = merge_top(top_definition(spec)[0], top)
            positions, number, seen, caches = state
            x = ends.embed_tokens(tokens)
            new_caches = []
            for index, layer in enumerate(spec.layers):
                reach = jnp.asarray(reach_of(layer))
                entered, cache = steps.enter_layer(
                    spec, layer.kind, layers[index], x, caches[index], positions, reach, span
                )
                new_caches.append(cache)
                if isinstance(entered, steps.Routed):
                    slot_row = jnp.asarray(slot_of[moe_index[index]])
                    outputs = steps.run_experts(spec, engine.programs.kernels, entered, pool, slot_row)
                    output = steps.combine_step(spec, entered, outputs)
                    entered = steps.finish_experts(spec, finish[index], entered, output)
                x = entered
            chosen, _ = sample(ends.logits(x[:, 0]), seen, number, sampling)
            chosen = chosen[:, None]
            seen = mark_seen(seen, chosen, jnp.ones_like(chosen, bool))
            return chosen, (positions + 1, number + 1, seen, new_caches)

        self._sampling = jax.device_put(sampling_arrays([(SamplingOptions(), 0)]), engine._rows.sharding)
        jitted = jax.jit(step, donate_argnums=6, out_shardings=engine._rows.sharding)
        self._step = jitted.lower(*self._weights, *self._state()).compile()

    def decode(self, count: int) -> tuple[float, np.ndarray]:
        """Go on from where the engine is now, without changing it: seconds of `count` steps, tokens int32 `[count]`."""
        tokens, state = jax.block_until_ready(self._state())
        weights = self._weights
        chosen = []
        began = time.perf_counter()
        for _ in range(count):
            tokens, state = self._step(*weights, tokens, state)
            chosen.append(tokens)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        return seconds, np.asarray([int(token[0, 0]) for token in chosen], np.int32)

    @property
    def _weights(self) -> tuple[Any, ...]:
        return self._dense.top, self._dense.layers, self._dense.finish, self._engine.link.pool.array, self._sampling

    def _state(self) -> tuple[jax.Array, Any]:
        """Copies of the engine's one row: the last token, and `(positions, number, seen, caches)`."""
        rows = self._engine._rows
        given = (rows.tokens[:, None].copy(), rows.length[:, None].copy(), rows.step.copy())
        tokens, *counters = jax.device_put(given, rows.sharding)
        caches = jax.tree.map(jnp.copy, rows.caches)
        return tokens, (*counters, jnp.copy(rows.seen), caches)
