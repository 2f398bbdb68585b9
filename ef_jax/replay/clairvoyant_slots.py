"""`ClairvoyantSlots`: a cache that gives up the block whose next use is furthest."""

import heapq
from collections.abc import Iterable

import numpy as np

from ef_jax.errors import InputError
from ef_jax.replay.layer_steps import LayerSteps


class ClairvoyantSlots:
    """Which keys have a slot, and who leaves first.

    Args:
      steps: what is needed, in order.
      slots: cache slots C.
      free_start: the layer-step before which the slots may take what they like best, at no cost; None starts empty.

    Attributes:
      resident: one byte a key, 1 where it has a slot.

    Raises:
      InputError: negative slots.
    """

    # The heap holds `LayerSteps.entries`. A key that is hit gets a new entry and the old one stays: its next use has
    # passed, so it sinks below all entries that still hold.

    def __init__(self, steps: LayerSteps, slots: int, *, free_start: int | None = None) -> None:
        if slots < 0:
            raise InputError(f"{slots} cache slots: give 0 or more")
        self.resident = bytearray(steps.num_keys)
        self._slots, self._free, self._num_keys = slots, slots, steps.num_keys
        self._heap: list[int] = []
        if free_start is not None:
            next_use = steps.upcoming(free_start)
            entries = steps.entries(next_use, np.arange(steps.num_keys, dtype=np.int32))
            self._keep(entries[next_use < len(steps.keys)].tolist())

    def take(self, key: int, limit: int) -> bool:
        """Give `key` a free slot, or else that of the furthest next use if its entry lies below `limit`.

        Returns:
          Whether it got one.
        """
        if self._free:
            self._free -= 1
        elif self._heap and self._heap[0] < limit:
            self.resident[heapq.heappop(self._heap) % self._num_keys] = 0
        else:
            return False
        self.resident[key] = 1
        return True

    def used(self, entries: Iterable[int], limit: int) -> None:
        """Note when the keys of a layer-step, whose limit is `limit`, are needed next; from now on they may leave."""
        heap = self._heap
        for entry in entries:
            heapq.heappush(heap, entry)
        if len(heap) > 4 * self._slots + 1024:
            heap[:] = [entry for entry in heap if entry < limit]
            heapq.heapify(heap)

    def prompt(self, keys: Iterable[int], entries: list[int], limit: int) -> None:
        """Keep what is needed first of the residents and the keys of a prompt."""
        brought = set(keys)
        self._keep([e for e in self._heap if e < limit and e % self._num_keys not in brought] + entries)

    def _keep(self, entries: list[int]) -> None:
        kept = heapq.nlargest(self._slots, entries)
        self._heap = kept[::-1]  # ascending, so a heap
        self._free = self._slots - len(kept)
        self.resident[:] = bytes(len(self.resident))
        for entry in kept:
            self.resident[entry % self._num_keys] = 1
