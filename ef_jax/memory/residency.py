"""Which expert block is in which slot: tables over ids, no arrays of weights, no policy of its own.

Slots `[0, cache_slots)` are the cache; `[cache_slots, cache_slots + staging_slots)` are the staging ring, which
blocks pass through without being remembered (prefill waves, and misses that the policy does not admit).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ef_jax.memory.policies import Policy


@dataclasses.dataclass(slots=True)
class Admission:
    """What one layer of a step needs: `slot_row` int32 `[E]` maps experts to slots (-1: not needed or not there)."""

    slot_row: np.ndarray
    hits: int
    missing: list[int]
    missing_slots: list[int]


class Residency:
    """The table of one device's slots.

    Args:
      layers: MoE layers.
      experts: experts a layer, E.
      cache_slots: slots that remember their block.
      staging_slots: slots of the staging ring.
      policy: says who leaves.
      floor: slots that a layer keeps whatever others need; None: an equal share, `cache_slots // layers`. Floors
        keep a global LRU from falling to zero hits below one token cycle (`layers x K` slots).
    """

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        cache_slots: int,
        staging_slots: int,
        policy: Policy,
        floor: int | None = None,
    ) -> None:
        self.layers, self.experts = layers, experts
        self.cache_slots, self.staging_slots = cache_slots, staging_slots
        self.policy = policy
        self.floor = cache_slots // layers if floor is None else floor
        self.slot_of = np.full((layers, experts), -1, np.int32)
        self.key_of: list[tuple[int, int] | None] = [None] * cache_slots
        self.count = [0] * layers
        self._free = list(range(cache_slots - 1, -1, -1))
        self._quota = -(-cache_slots // layers)

    @property
    def all_resident(self) -> bool:
        """Every expert of every layer is in a slot, so nothing can miss."""
        return len(self._free) + self.layers * self.experts == self.cache_slots

    def admit(self, layer: int, needed: Sequence[int]) -> Admission:
        """Make room for the experts that a decode step needs in `layer`.

        Args:
          layer: MoE layer.
          needed: distinct expert ids.

        Returns:
          The step's slots; `missing` must be copied into `missing_slots` before the step computes. A miss that finds
          no free slot and that the policy does not admit goes to the staging ring.

        Raises:
          ValueError: more experts pass through at once than the staging ring has slots.
        """
        row = self.slot_of[layer]
        missing = [expert for expert in needed if row[expert] < 0]
        hits = len(needed) - len(missing)
        if not missing:
            self.policy.on_access(layer, needed)
            return Admission(row.copy(), hits, missing, [])
        wanted = frozenset(needed)
        self.policy.on_access(layer, [expert for expert in needed if row[expert] >= 0])
        slots: list[int] = []
        staged: list[tuple[int, int]] = []
        for expert in missing:
            slot = self._room(layer, wanted)
            if slot is None:
                slot = self.cache_slots + len(staged)
                staged.append((expert, slot))
            else:
                self._enter(layer, expert, slot)
                self.policy.on_access(layer, (expert,))
            slots.append(slot)
        if len(staged) > self.staging_slots:
            raise ValueError(f"{len(staged)} experts must pass through {self.staging_slots} staging slots at once")
        slot_row = row.copy()
        for expert, slot in staged:
            slot_row[expert] = slot
        return Admission(slot_row, hits, missing, slots)

    def seed(self, layer: int, missing: Sequence[int]) -> list[tuple[int, int]]:
        """Give free cache slots, within the layer's share, to experts that a prompt uses; evicts nothing.

        Args:
          layer: MoE layer.
          missing: absent experts, most used first.

        Returns:
          `(expert, slot)` of those that found a place; the caller copies them in.
        """
        placed = []
        for expert in missing:
            if not self._free or self.count[layer] >= self._quota:
                break
            slot = self._free.pop()
            self._enter(layer, expert, slot)
            placed.append((expert, slot))
        return placed

    def clear(self) -> None:
        """Forget every block; slots are free again."""
        for key in self.key_of:
            if key is not None:
                self.policy.on_evict(*key)
        self.slot_of[:] = -1
        self.key_of = [None] * self.cache_slots
        self.count = [0] * self.layers
        self._free = list(range(self.cache_slots - 1, -1, -1))

    def _room(self, layer: int, needed: frozenset[int]) -> int | None:
        if self._free:
            return self._free.pop()
        if not self.cache_slots:
            return None
        may_lose = [count > self.floor for count in self.count]
        may_lose[layer] = self.count[layer] > 0
        key = self.policy.victim(layer, needed, may_lose)
        if key is None:
            return None
        slot = int(self.slot_of[key])
        self.slot_of[key] = -1
        self.count[key[0]] -= 1
        self.key_of[slot] = None
        self.policy.on_evict(*key)
        return slot

    def _enter(self, layer: int, expert: int, slot: int) -> None:
        self.slot_of[layer, expert] = slot
        self.key_of[slot] = (layer, expert)
        self.count[layer] += 1
