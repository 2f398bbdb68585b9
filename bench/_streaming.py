"""Layer streaming, the baseline of `bench.offload` that caches nothing and predicts nothing.

Every decode step copies every layer's whole set of experts through two halves of a staging area: while one layer
computes from one half, the next layer's copies into the other are already under way. No router is waited for. Prompts
run as they do in any engine without a cache.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from bench import _models
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.runtime.steps import Routed


class StreamingEngine(Engine):
    """An engine whose decode steps copy whole layers in. Stats count a layer's experts as misses, used or not."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        count = self.spec.experts.count
        self._halves = [np.arange(count, dtype=np.int32), np.arange(count, 2 * count, dtype=np.int32)]
        self._half = 0
        self._coming: list[jax.Array] | None = None

    def _serve(self, deferred, index: int, routed: Routed):  # type: ignore[no-untyped-def]
        layers, count = len(self.spec.moe_layers), self.spec.experts.count
        phase, spent = self.stats.decode, self.link.seconds
        blocks = self._coming or self.link.start(index, range(count))
        self._half = 1 - self._half
        slots = self._halves[self._half]
        self.link.finish(blocks, slots.tolist())
        self._coming = self.link.start((index + 1) % layers, range(count))
        phase.misses[index] += count
        phase.bytes_demand += count * self.plan.block_bytes
        phase.stall_seconds += self.link.seconds - spent
        return routed, self.link.pool.array, slots.copy(), self._no_outputs

    def rest(self) -> None:
        """See `Engine`; copies under way are given up."""
        self._coming = None
        super().rest()


def streaming_model(lm: LanguageModel) -> LanguageModel:
    """A layer-streaming model over the weights of `lm`, which must have no cache slots; `lm` stays usable."""
    engine, spec = lm._engine, lm.spec
    slots = 2 * spec.experts.count
    plan = dataclasses.replace(engine.plan, staging_slots=slots, staging=slots * spec.block_bytes)
    plan = dataclasses.replace(plan, budget=plan.total)
    return _models.over(lm, plan, engine.programs.with_pool_slots(slots), "static", StreamingEngine)
