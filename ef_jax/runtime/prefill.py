"""Experts of a prompt's chunk: most of a layer is needed, so blocks stream through in waves.

Experts that are resident run first; then those that a free cache slot is found for (the prompt seeds the cache, within
each layer's share); the others pass through the staging ring. Nothing is evicted, so a prompt does not cost a running
cache its blocks. Each wave's copies start before the compute of the wave before it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ef_jax.memory.residency import Residency
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.runtime.stats import PhaseStats
from ef_jax.runtime.steps import SortedRows
from ef_jax.schedule.link import DeviceLink


class PromptExperts:
    """Serves the routed rows of a chunk, layer by layer."""

    def __init__(self, residency: Residency, link: DeviceLink) -> None:
        self._residency, self._link = residency, link

    def run(
        self, layer: int, rows: SortedRows, outputs: jax.Array, wave: Callable[..., Any], phase: PhaseStats
    ) -> jax.Array:
        """Outputs of every routed row of MoE layer `layer`.

        Args:
          layer: MoE layer.
          rows: the chunk's rows, sorted by expert.
          outputs: `[M, D]`, donated to the first wave.
          wave: the compiled wave program.
          phase: counters to add to.
        """
        residency, link = self._residency, self._link
        sizes = np.asarray(rows.sizes)
        used = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)].tolist()
        waves, missing = self._waves(layer, used)
        phase.hits[layer] += len(used) - missing
        phase.misses[layer] += missing
        moved, spent = link.bytes_moved, link.seconds

        blocks = link.start(layer, waves[0][0])
        for number, (experts, slot_row) in enumerate(waves):
            link.finish(blocks, [int(slot_row[expert]) for expert in experts])
            if number + 1 < len(waves):
                if link.mode == "async":
                    link.pool.array.block_until_ready()  # at most two waves of blocks are in flight
                blocks = link.start(layer, waves[number + 1][0])
            outputs = wave(rows, outputs, link.pool.array, slot_row)

        residency.policy.on_prompt(layer, [e for e in reversed(used) if residency.slot_of[layer, e] >= 0])
        phase.bytes_demand += link.bytes_moved - moved
        phase.stall_seconds += link.seconds - spent
        return outputs

    def _waves(self, layer: int, used: list[int]) -> tuple[list[tuple[list[int], np.ndarray]], int]:
        """What to copy in and then compute, wave by wave, for experts `used` (most rows first); and how many miss.

        A wave is the experts to copy and the slots `[E]` to compute from.
        """
        residency = self._residency
        resident = residency.slot_of[layer].copy()
        missing = [expert for expert in used if resident[expert] < 0]
        seeded = residency.seed(layer, missing)
        ring = residency.staging_slots
        passing = missing[len(seeded) :]
        staged = [(expert, residency.cache_slots + i % ring) for i, expert in enumerate(passing)]
        waves: list[tuple[list[int], np.ndarray]] = []
        if len(missing) < len(used):
            waves.append(([], resident))
        for copies, size in ((seeded, ring or MAX_INSERT), (staged, ring)):
            for first in range(0, len(copies), max(size, 1)):
                part = copies[first : first + size]
                slot_row = np.full(residency.experts, -1, np.int32)
                for expert, slot in part:
                    slot_row[expert] = slot
                waves.append(([expert for expert, _ in part], slot_row))
        return waves, len(missing)
