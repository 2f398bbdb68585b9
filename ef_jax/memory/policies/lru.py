"""Least recently used."""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ef_jax.memory.policies.base import Key, Policy, most_used


class Lru(Policy):
    """Evicts the key whose last use is longest ago, among the layers that may lose one."""

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._order: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layers)]
        self._clock = 0

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._clock = clock = self._clock + 1
        order = self._order[layer]
        for row in rows:
            for expert in row:
                if expert in order:
                    order[expert] = clock
                    order.move_to_end(expert)

    def on_prompt(self, layer: int, counts: np.ndarray) -> None:
        order = self._order[layer]
        for expert in reversed(most_used(counts)):
            if expert in order:  # from the least to the most used
                self._clock += 1
                order[expert] = self._clock
                order.move_to_end(expert)

    def on_enter(self, layer: int, expert: int) -> None:
        self._order[layer][expert] = self._clock

    def on_evict(self, layer: int, expert: int) -> None:
        del self._order[layer][expert]

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        chosen: list[Key | None] = []
        if sum(spare) == spare[layer]:
            for expert in self._order[layer]:
                if expert not in needed:
                    chosen.append((layer, expert))
                    if len(chosen) == len(missing):
                        break
        else:
            chosen += itertools.islice(self._oldest(layer, needed, spare), len(missing))
        return chosen + [None] * (len(missing) - len(chosen))

    def _oldest(self, layer: int, needed: Collection[int], spare: Sequence[int]) -> Iterator[Key]:
        """Keys that may leave, the least recently used first."""
        left = list(spare)
        ages = [_ages(candidate, self._order[candidate]) for candidate, keys in enumerate(spare) if keys]
        for _, candidate, expert in heapq.merge(*ages):
            if left[candidate] and not (candidate == layer and expert in needed):
                left[candidate] -= 1
                yield candidate, expert


def _ages(layer: int, order: OrderedDict[int, int]) -> Iterator[tuple[int, int, int]]:
    for expert, stamp in order.items():
        yield stamp, layer, expert
