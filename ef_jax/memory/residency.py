"""Which expert block is in which slot: tables over ids, no arrays of weights, no policy of its own.

Slots `[0, cache_slots)` are the cache; `[cache_slots, cache_slots + staging_slots)` are the staging ring, which
blocks pass through without being remembered (prefill waves, and misses that the policy does not admit).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from ef_jax.memory.policies import Key, Policy


@dataclasses.dataclass(slots=True)
class Admission:
    """What one layer of a decode step needs, as distinct experts.

    Attributes:
      hits: resident when asked for.
      late: were on their way and have a slot; the step waits for them.
      missing: absent; to be copied into `missing_slots` before the step computes.
      missing_slots: one slot for each of `missing`.
      staged: of `missing`, those that only pass through, with their slots; the table does not remember them.
    """

    hits: int
    late: list[int]
    missing: list[int]
    missing_slots: list[int]
    staged: list[tuple[int, int]]


class Residency:
    """The table of one device's slots.

    Args:
      layers: MoE layers.
      experts: experts a layer, E.
      cache_slots: slots that remember their block.
      staging_slots: slots of the staging ring.
      policy: says who leaves; its `floor_share` of an equal share is each layer's floor.

    Attributes:
      slot_of: int32 `[L, E]`, the slot of each resident key; -1 for the others, those in flight among them.
      key_of: the key that each cache slot holds or waits for; None where free.
      count: slots of each layer, those that wait for a copy among them.
      floors: slots that each layer keeps whatever others need.
      wasted: blocks that were prefetched and left without having been used.
    """

    def __init__(self, *, layers: int, experts: int, cache_slots: int, staging_slots: int, policy: Policy) -> None:
        self.layers, self.experts = layers, experts
        self.cache_slots, self.staging_slots = cache_slots, staging_slots
        self.policy = policy
        share, extra = divmod(cache_slots, layers)
        self.floors = [int((share + (layer < extra)) * policy.floor_share) for layer in range(layers)]
        self.slot_of = np.full((layers, experts), -1, np.int32)
        self.key_of: list[Key | None] = [None] * cache_slots
        self.count = [0] * layers
        self.wasted = 0
        self._slots = self.slot_of.tolist()  # the same table as lists, which Python reads ten times faster
        self._spare = [0] * layers
        self._in_flight: dict[Key, int] = {}
        self._unused: set[Key] = set()
        self._free = list(range(cache_slots - 1, -1, -1))
        self._quota = -(-cache_slots // layers)

    @property
    def all_resident(self) -> bool:
        """Every expert of every layer is in a slot, so nothing can miss."""
        return len(self._free) + self.layers * self.experts == self.cache_slots

    def admit(self, layer: int, rows: Sequence[Sequence[int]]) -> Admission:
        """Make room for the experts that a decode step needs in `layer`.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, distinct within a row.

        Returns:
          What to copy and where. A miss that finds no free slot and that the policy does not admit goes to the
          staging ring.

        Raises:
          ValueError: more experts pass through at once than the staging ring has slots.
        """
        needed = rows[0] if len(rows) == 1 else list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        self.policy.on_route(layer, rows)
        slots = self._slots[layer]
        missing = [expert for expert in needed if slots[expert] < 0]
        if self._unused:
            self._unused.difference_update([(layer, expert) for expert in needed])
        if not missing:
            return Admission(len(needed), [], missing, [], [])
        hits = len(needed) - len(missing)
        late: list[int] = []
        if self._in_flight:
            late = [expert for expert in missing if (layer, expert) in self._in_flight]
            missing = [expert for expert in missing if (layer, expert) not in self._in_flight]
        missing_slots: list[int] = []
        staged: list[tuple[int, int]] = []
        for expert, slot in zip(missing, self._room(layer, missing, needed), strict=True):
            if slot is None:
                slot = self.cache_slots + len(staged)
                staged.append((expert, slot))
            else:
                self._hold(layer, expert, slot)
                self._enter(layer, expert, slot)
            missing_slots.append(slot)
        if len(staged) > self.staging_slots:
            raise ValueError(f"{len(staged)} experts must pass through {self.staging_slots} staging slots at once")
        return Admission(hits, late, missing, missing_slots, staged)

    def slot_row(self, layer: int, admission: Admission) -> Int32[np.ndarray, "E"]:
        """Slots of the experts of `layer` for the step that `admission` is of; -1: not there."""
        row = self.slot_of[layer].copy()
        for expert, slot in admission.staged:
            row[expert] = slot
        return row

    def reserve(self, layer: int, expert: int) -> int | None:
        """A slot for a block that is fetched on a prediction; the key is in flight until `arrive` or `cancel`.

        Returns:
          The slot; None where the key has one already or the policy gives none up for it.
        """
        if self._slots[layer][expert] >= 0 or (layer, expert) in self._in_flight:
            return None
        slot = self._room(layer, [expert], [expert])[0]
        if slot is not None:
            self._hold(layer, expert, slot)
            self._in_flight[layer, expert] = slot
        return slot

    def arrive(self, layer: int, expert: int, *, used: bool = False) -> None:
        """The block of a key in flight is in its slot; `used` where the running step has waited for it."""
        self._enter(layer, expert, self._in_flight.pop((layer, expert)))
        if not used:
            self._unused.add((layer, expert))

    def cancel(self, layer: int, expert: int) -> None:
        """A key in flight will not come; its slot is free."""
        slot = self._in_flight.pop((layer, expert))
        self.key_of[slot] = None
        self._lose(layer)
        self._free.append(slot)

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
            self._hold(layer, expert, slot)
            self._enter(layer, expert, slot)
            placed.append((expert, slot))
        return placed

    def clear(self) -> None:
        """Forget every block; slots are free again. Nothing may be in flight."""
        for key in self.key_of:
            if key is not None:
                self._free.append(self._evict(*key))
        self._free.sort(reverse=True)

    def _room(self, layer: int, missing: Sequence[int], needed: Sequence[int]) -> Sequence[int | None]:
        """A slot for each of `missing`: free ones first, then the policy's victims'; None: to be staged."""
        free = self._free
        slots: list[int | None] = [free.pop() for _ in range(min(len(free), len(missing)))]
        left = missing[len(slots) :]
        if not left:
            return slots
        if not self.cache_slots:
            return [*slots, *[None] * len(left)]
        spare, own = self._spare, self._spare[layer]
        spare[layer] = self.count[layer]
        keys = self.policy.victims(layer, left, needed if len(needed) <= 8 else frozenset(needed), spare)
        spare[layer] = own
        for key in keys:
            slots.append(None if key is None else self._evict(*key))
        return slots

    def _hold(self, layer: int, expert: int, slot: int) -> None:
        self.key_of[slot] = (layer, expert)
        count = self.count[layer] = self.count[layer] + 1
        if count > self.floors[layer]:
            self._spare[layer] += 1

    def _enter(self, layer: int, expert: int, slot: int) -> None:
        self.slot_of[layer, expert] = slot
        self._slots[layer][expert] = slot
        self.policy.on_enter(layer, expert)

    def _lose(self, layer: int) -> None:
        if self._spare[layer]:
            self._spare[layer] -= 1
        self.count[layer] -= 1

    def _evict(self, layer: int, expert: int) -> int:
        slot: int = self._slots[layer][expert]
        self.slot_of[layer, expert] = -1
        self._slots[layer][expert] = -1
        self.key_of[slot] = None
        self._lose(layer)
        if (layer, expert) in self._unused:
            self._unused.discard((layer, expert))
            self.wasted += 1
        self.policy.on_evict(layer, expert)
        return slot
