"""Which expert block is in which slot: tables over ids, no arrays of weights, no policy of its own.

Slots `[0, cache_slots)` are the cache; `[cache_slots, cache_slots + staging_slots)` are the staging ring, which
blocks pass through without being remembered (prefill waves, and misses that the policy does not admit).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from ef_jax.memory.policies import Key, Policy


@dataclasses.dataclass(slots=True)
class Admission:
    """What one layer of a decode step needs, as distinct experts.

    Attributes:
      hits: resident when asked for.
      foreseen: of these, those that a prefetch had brought and that are used for the first time.
      late: were on their way and have a slot; the step waits for them.
      missing: absent; to be copied into `missing_slots` before the step computes.
      missing_slots: one slot for each of `missing`.
      staged: of `missing`, those that only pass through, with their slots; the table does not remember them.
      left: absent too, and somebody else's to see to: they get no slot.
    """

    hits: int
    late: list[int]
    missing: list[int]
    missing_slots: list[int]
    staged: list[tuple[int, int]]
    foreseen: int = 0
    left: Sequence[int] = ()


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
      count: slots of each layer, those that wait for a copy among them.
      floors: slots that each layer keeps whatever others need.
      wasted: of each layer, the blocks that were prefetched and left without having been used.
      on_wasted: called with layer and expert of each of these, if it is not None.
    """

    def __init__(self, *, layers: int, experts: int, cache_slots: int, staging_slots: int, policy: Policy) -> None:
        self.layers, self.experts = layers, experts
        self.cache_slots, self.staging_slots = cache_slots, staging_slots
        self.policy = policy
        share, extra = divmod(cache_slots, layers)
        self.floors = [int((share + (layer < extra)) * policy.floor_share) for layer in range(layers)]
        self.slot_of = np.full((layers, experts), -1, np.int32)
        self.count = [0] * layers
        self.wasted = [0] * layers
        self.on_wasted: Callable[[int, int], None] | None = None
        self._rows = [memoryview(row) for row in self.slot_of]  # what Python reads several times faster
        self._spare = [0] * layers
        self._in_flight: dict[Key, int] = {}
        self._unused: set[Key] = set()
        self._free = list(range(cache_slots - 1, -1, -1))
        self._quota = -(-cache_slots // layers)

    @property
    def all_resident(self) -> bool:
        """Every expert of every layer is in a slot, so nothing can miss."""
        return len(self._free) + self.layers * self.experts == self.cache_slots and not self._in_flight

    def has_all(self, layer: int) -> bool:
        """Every expert of `layer` is in a slot."""
        return self.count[layer] == self.experts and bool((self.slot_of[layer] >= 0).all())

    @property
    def key_of(self) -> list[Key | None]:
        """The key that each cache slot holds or waits for; None where free."""
        keys: list[Key | None] = [None] * self.cache_slots
        for layer, expert in np.argwhere(self.slot_of >= 0).tolist():
            keys[self._rows[layer][expert]] = (layer, expert)
        for key, slot in self._in_flight.items():
            keys[slot] = key
        return keys

    @property
    def free(self) -> int:
        """Cache slots that hold nothing and wait for nothing."""
        return len(self._free)

    @property
    def in_flight(self) -> list[Key]:
        """Keys that have a slot and wait for their block."""
        return list(self._in_flight)

    def absent(self, layer: int, needed: Sequence[int]) -> list[int]:
        """Of the distinct experts `needed`, those that are neither in a slot nor on their way."""
        row, in_flight = self._rows[layer], self._in_flight
        return [expert for expert in needed if row[expert] < 0 and (layer, expert) not in in_flight]

    def held(self, layer: int) -> Bool[np.ndarray, "E"]:
        """Which experts of `layer` are in a slot or on their way; an array of its own."""
        there: np.ndarray = self.slot_of[layer] >= 0
        there[[expert for of, expert in self._in_flight if of == layer]] = True
        return there

    def admit(self, layer: int, rows: Sequence[Sequence[int]], left: Sequence[int] = ()) -> Admission:
        """Make room for the experts that a decode step needs in `layer`.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, distinct within a row.
          left: of the absent ones, those that need no slot. The policy hears of them all the same.

        Returns:
          What to copy and where. A miss that finds no free slot and that the policy does not admit goes to the
          staging ring.

        Raises:
          ValueError: more experts pass through at once than the staging ring has slots.
        """
        needed = rows[0] if len(rows) == 1 else list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        self.policy.on_route(layer, rows)
        row = self._rows[layer]
        missing = [expert for expert in needed if row[expert] < 0]
        foreseen = 0
        if self._unused:
            foreseen = len(self._unused)
            self._unused.difference_update([(layer, expert) for expert in needed])
            foreseen -= len(self._unused)
        hits, late = len(needed) - len(missing), []
        if self._in_flight:
            late = [expert for expert in missing if (layer, expert) in self._in_flight]
            missing = [expert for expert in missing if (layer, expert) not in self._in_flight]
        if left:
            missing = [expert for expert in missing if expert not in left]
        admission = Admission(hits, late, missing, [], [], foreseen, left)
        if missing:
            self._place(layer, missing, needed, admission)
        return admission

    def admit_left(
        self, layer: int, rows: Sequence[Sequence[int]], admission: Admission, experts: Sequence[int]
    ) -> None:
        """Make room after all for some `experts` that `admission`, of the same layer and rows, has left: they are
        missing now, and their slots come last."""
        needed = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        admission.left = [expert for expert in admission.left if expert not in experts]
        admission.missing = [*admission.missing, *experts]
        self._place(layer, experts, needed, admission)

    def _place(self, layer: int, missing: Sequence[int], needed: Sequence[int], admission: Admission) -> None:
        """Find a slot for each of `missing`, in the cache or in the staging ring."""
        row, enter, staged = self._rows[layer], self.policy.on_enter, admission.staged
        for expert, slot in zip(missing, self._room(layer, missing, needed), strict=True):
            if slot is None:
                slot = self.cache_slots + len(staged)
                staged.append((expert, slot))
            else:
                row[expert] = slot
                enter(layer, expert)
            admission.missing_slots.append(slot)
        if len(staged) > self.staging_slots:
            raise ValueError(f"{len(staged)} experts must pass through {self.staging_slots} staging slots at once")

    def note(self, layer: int, rows: Sequence[Sequence[int]]) -> int:
        """A decode step used the experts `rows` of a layer, all of them resident; returns how many distinct ones."""
        self.policy.on_route(layer, rows)
        needed = set(itertools.chain.from_iterable(rows))
        if self._unused:
            self._unused.difference_update([(layer, expert) for expert in needed])
        return len(needed)

    def slot_row(self, layer: int, admission: Admission) -> Int32[np.ndarray, "E"]:
        """Slots of the experts of `layer` for the step that `admission` is of; -1: not there."""
        row = self.slot_of[layer].copy()
        for expert, slot in admission.staged:
            row[expert] = slot
        return row

    def reserve(self, layer: int, expert: int, *, keep: Sequence[int] = (), closed: Iterable[int] = ()) -> int | None:
        """A slot for a block that is fetched on a prediction; the key is in flight until `arrive` or `cancel`.

        Args:
          layer: MoE layer.
          expert: its expert.
          keep: experts of `layer` that do not leave for it.
          closed: layers that lose nothing for it, other than `layer` itself: the running one above all, whose slots
            are about to be read.

        Returns:
          The slot; None where the key has one already or the policy gives none up for it.
        """
        if self._rows[layer][expert] >= 0 or (layer, expert) in self._in_flight:
            return None
        slot = self._room(layer, [expert], [expert, *keep], closed)[0]
        if slot is not None:
            self._in_flight[layer, expert] = slot
        return slot

    def displace(self, layer: int, expert: int, victim: Key | None) -> int:
        """As `reserve`, with a free slot or, where `victim` is a resident key, with its slot; the slot.

        Any layer can lose a key in this way, whatever its floor.
        """
        if victim is None:
            slot = self._free.pop()
        else:
            slot = self._evict(*victim)
            self._lose(victim[0])
        self._gain(layer)
        self._in_flight[layer, expert] = slot
        return slot

    def waiting(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The slots of keys in flight."""
        return [self._in_flight[layer, expert] for expert in experts]

    def arrive(self, layer: int, expert: int, *, used: bool = False) -> None:
        """The block of a key in flight is in its slot; `used` where the running step has waited for it."""
        self._rows[layer][expert] = self._in_flight.pop((layer, expert))
        self.policy.on_enter(layer, expert)
        if not used:
            self._unused.add((layer, expert))

    def cancel(self, layer: int, expert: int) -> None:
        """A key in flight will not come; its slot is free."""
        self._free.append(self._in_flight.pop((layer, expert)))
        self._lose(layer)

    def drop(self, layer: int, expert: int) -> None:
        """A resident key is lost; its slot is free."""
        self._free.append(self._evict(layer, expert))
        self._lose(layer)

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
            self._gain(layer)
            self._rows[layer][expert] = slot
            self.policy.on_enter(layer, expert)
            placed.append((expert, slot))
        return placed

    def clear(self) -> None:
        """Forget every block; slots are free again. Nothing may be in flight."""
        for layer, expert in np.argwhere(self.slot_of >= 0).tolist():
            self.drop(layer, expert)
        self._free.sort(reverse=True)

    def _room(
        self, layer: int, missing: Sequence[int], needed: Sequence[int], closed: Iterable[int] = ()
    ) -> list[int | None]:
        """A slot of `layer` for each of `missing`: free ones first, then the policy's victims'; None: to be staged."""
        slots: list[int | None] = []
        while self._free and len(slots) < len(missing):
            slots.append(self._free.pop())
            self._gain(layer)
        left = missing[len(slots) :] if slots else missing
        if not left:
            return slots
        if not self.cache_slots:
            return [None] * len(missing)
        spare, own = self._spare, self._spare[layer]
        if closed:
            spare = spare.copy()
            for other in closed:
                spare[other] = 0
        spare[layer] = self.count[layer]
        keys = self.policy.victims(layer, left, needed if len(needed) <= 8 else frozenset(needed), spare)
        spare[layer] = own
        for key in keys:
            if key is None:
                slots.append(None)
                continue
            if key[0] != layer:
                self._lose(key[0])
                self._gain(layer)
            slots.append(self._evict(*key))
        return slots

    def _gain(self, layer: int) -> None:
        count = self.count[layer] = self.count[layer] + 1
        if count > self.floors[layer]:
            self._spare[layer] += 1

    def _lose(self, layer: int) -> None:
        if self._spare[layer]:
            self._spare[layer] -= 1
        self.count[layer] -= 1

    def _evict(self, layer: int, expert: int) -> int:
        """Take a key's slot; the layer's count is the caller's to change."""
        row = self._rows[layer]
        slot: int = row[expert]
        row[expert] = -1
        if self._unused and (layer, expert) in self._unused:
            self._unused.discard((layer, expert))
            self.wasted[layer] += 1
            if self.on_wasted is not None:
                self.on_wasted(layer, expert)
        self.policy.on_evict(layer, expert)
        return slot
