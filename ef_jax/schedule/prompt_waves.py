"""In what order a prompt's chunk goes through the experts of a layer: ids only.

A chunk needs most experts of a layer, so blocks stream through in waves. Experts that are resident run first; then
those that a free cache slot is found for (the prompt seeds the cache, within each layer's share); the others pass
through the staging ring. Nothing is evicted, so a prompt does not cost a running cache its blocks.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32

from ef_jax.memory.policies.base import most_used
from ef_jax.memory.residency import Residency


@dataclasses.dataclass(slots=True)
class Wave:
    """Blocks to copy in together, and the slots `[E]` (-1: not in this wave) to compute from once they are there; and
    whether no wave follows."""

    experts: list[int]
    slots: list[int]
    slot_row: Int32[np.ndarray, "E"]
    last: bool = False


def prompt_waves(
    residency: Residency, layer: int, counts: Int[np.ndarray, "E"], *, wave_size: int
) -> tuple[list[Wave], int, int]:
    """Waves for a chunk that gives each expert of `layer` so many rows; at least one.

    Args:
      residency: gives slots to the experts that find one; the table changes.
      layer: MoE layer.
      counts: rows of each expert.
      wave_size: blocks that enter cache slots together, where there is no staging ring.

    Returns:
      The waves, and how many of the used experts were resident, and how many were not.
    """
    used = most_used(counts)
    resident = residency.slot_of[layer].copy()
    missing = [expert for expert in used if resident[expert] < 0]
    seeded = residency.seed(layer, missing)
    ring = residency.staging_slots
    staged = [(expert, residency.cache_slots + i % ring) for i, expert in enumerate(missing[len(seeded) :])]
    waves = [Wave([], [], resident)] if len(missing) < len(used) or not used else []
    for copies, size in ((seeded, ring or wave_size), (staged, ring)):
        for first in range(0, len(copies), max(size, 1)):
            part = copies[first : first + size]
            experts, slots = [expert for expert, _ in part], [slot for _, slot in part]
            slot_row = np.full(residency.experts, -1, np.int32)
            slot_row[experts] = slots
            waves.append(Wave(experts, slots, slot_row))
    waves[-1].last = True
    return waves, len(used) - len(missing), len(missing)
