"""Eviction policies over ids: plain Python, no arrays, a few microseconds a decision.

A policy hears about every access and says which resident key gives up its slot. Keys are `(layer, expert)` with
`layer` counted among the MoE layers. The caller (`Residency`) says which layers may lose a key: those above their
floor, and the layer that needs room; and which experts of that layer the running step needs, which are never victims.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

Key = tuple[int, int]


@runtime_checkable
class Policy(Protocol):
    """What the residency table asks of an eviction policy."""

    def on_access(self, layer: int, experts: Sequence[int]) -> None:
        """Resident `experts` of `layer` are used by a step (hits, and misses once admitted)."""

    def on_evict(self, layer: int, expert: int) -> None:
        """A key left the cache."""

    def on_prompt(self, layer: int, experts: Sequence[int]) -> None:
        """Resident `experts` of `layer` served a prompt; sorted from least to most used."""

    def victim(self, layer: int, needed: Collection[int], may_lose: Sequence[bool]) -> Key | None:
        """The key to evict for a miss in `layer`; None: keep the cache as it is (the miss passes through staging)."""


class Lru:
    """Least recently used, over all layers that may lose a key."""

    def __init__(self, layers: int) -> None:
        self._order: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layers)]
        self._clock = 0

    def on_access(self, layer: int, experts: Sequence[int]) -> None:
        order = self._order[layer]
        self._clock += 1
        for expert in experts:
            order[expert] = self._clock
            order.move_to_end(expert)

    def on_evict(self, layer: int, expert: int) -> None:
        del self._order[layer][expert]

    def on_prompt(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self.on_access(layer, (expert,))

    def victim(self, layer: int, needed: Collection[int], may_lose: Sequence[bool]) -> Key | None:
        best: Key | None = None
        best_stamp = self._clock + 1
        for candidate, order in enumerate(self._order):
            if not may_lose[candidate]:
                continue
            for expert, stamp in order.items():
                if candidate == layer and expert in needed:
                    continue
                if stamp < best_stamp:
                    best, best_stamp = (candidate, expert), stamp
                break
        return best


class Static:
    """A fixed hot set: whatever first fills the cache stays; every other expert passes through staging."""

    def __init__(self, layers: int) -> None:
        del layers

    def on_access(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing to learn."""

    def on_evict(self, layer: int, expert: int) -> None:
        """Nothing is evicted."""

    def on_prompt(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing to learn."""

    def victim(self, layer: int, needed: Collection[int], may_lose: Sequence[bool]) -> Key | None:
        return None


POLICIES: dict[str, Callable[[int], Policy]] = {"lru": Lru, "static": Static}
