"""Blocks that cross the link without being waited for: what has come, what has failed, what is taken back."""

from collections.abc import Sequence
from typing import Generic

from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Residency
from ef_jax.schedule.link import Blocks, PrefetchLink


class Arrivals(Generic[Blocks]):
    """Keeps the table of slots in step with a link's prefetches, and uses what time the link has left.

    A block that a layer has needed and done without, because the host computed it, is as likely to be needed again as
    one that was copied. Without its copy the cache stays as it is: the bundled model at half of its experts then finds
    32 % of what it needs in a slot, and 61 to 71 % with it (`bench.compute_in_place`, batch 1).

    Args:
      residency: which block is where.
      link: copies blocks.
    """

    def __init__(self, residency: Residency, link: PrefetchLink[Blocks]) -> None:
        self._residency, self._link = residency, link
        self._queued = 0  # since the layer's gate
        self._after: set[Key] = set()

    @property
    def begun(self) -> int:
        """Prefetches that have begun so far."""
        return self._link.prefetches_begun

    def gate(self) -> None:
        """A layer is about to ask: drop what has not begun, take note of what has arrived or failed."""
        residency, link = self._residency, self._link
        self._queued = 0
        for key in link.withdraw():
            residency.cancel(*key)
        for key in link.arrived():
            residency.arrive(*key, used=key in self._after)
        for key in link.failed():
            residency.cancel(*key)
        if self._after:
            self._after.intersection_update(residency.in_flight)

    def follow(self, layer: int, experts: Sequence[int], needed: Sequence[int]) -> None:
        """Queue the blocks of `experts`, which a layer does without, behind all else: as many as the link can begin
        before the next layer asks. What the layer has `needed` keeps its slots."""
        keys: list[Key] = []
        slots: list[int] = []
        for expert in experts[: max(0, self._link.window() - self._queued) if experts else 0]:
            slot = self._residency.reserve(layer, expert, keep=needed)
            if slot is None:
                break
            keys.append((layer, expert))
            slots.append(slot)
        self._after.update(keys)
        self._link.prefetch(keys, slots)

    def wait(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Wait for blocks in flight that the running step needs; returns the experts whose copy has failed, which are
        still in flight for the table."""
        residency, link = self._residency, self._link
        link.wait([(layer, expert) for expert in experts])
        failed = set(link.failed())
        for expert in experts:
            if (layer, expert) not in failed:
                residency.arrive(layer, expert, used=True)
        lost = [expert for expert in experts if (layer, expert) in failed]
        for key in failed - {(layer, expert) for expert in lost}:
            residency.cancel(*key)
        return lost

    def drain(self) -> None:
        """Leave nothing in flight."""
        residency, link = self._residency, self._link
        self.gate()
        keys = residency.in_flight
        link.wait(keys)
        failed = set(link.failed())
        for key in keys:
            if key in failed:
                residency.cancel(*key)
            else:
                residency.arrive(*key, used=key in self._after)
        self._after.clear()
