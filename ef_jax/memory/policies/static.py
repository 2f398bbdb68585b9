"""A fixed hot set."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from ef_jax.memory.policies.base import Key, Policy


class Static(Policy):
    """Keeps a hot set that was chosen beforehand; every other expert passes through staging.

    A key of the hot set enters when it is first used. Without `choose`, whatever first fills the cache is the hot set.

    Attributes:
      floor_share: 0.0. The most used keys are kept wherever they are; nothing turns over, so no layer needs
        protection from others.
      gives_way: False. What leaves the hot set would not come back.
    """

    floor_share = 0.0
    gives_way = False

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self._hot: frozenset[Key] | None = None
        self._resident: dict[Key, None] = {}
        self._others: dict[Key, None] = {}  # resident keys outside a chosen hot set, the longest there first

    def choose(self, counts: Int[np.ndarray, "L E"]) -> None:
        """Make the most used keys the hot set, as many as there are slots; of equals, the first.

        Args:
          counts: uses of each key, for example in a trace.
        """
        most_used = np.argsort(-counts, axis=None, kind="stable")[: self.cache_slots].tolist()
        self._hot = frozenset(divmod(place, self.experts) for place in most_used)
        self._others = {key: None for key in self._resident if key not in self._hot}

    def on_enter(self, layer: int, expert: int) -> None:
        self._resident[layer, expert] = None
        if self._hot is not None and (layer, expert) not in self._hot:
            self._others[layer, expert] = None

    def on_evict(self, layer: int, expert: int) -> None:
        del self._resident[layer, expert]
        self._others.pop((layer, expert), None)

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        if self._hot is None or not self._others:
            return [None] * len(missing)
        leaving = self._leaving(layer, needed, list(spare))
        return [next(leaving, None) if (layer, expert) in self._hot else None for expert in missing]

    def _leaving(self, layer: int, needed: Collection[int], left: list[int]) -> Iterator[Key]:
        for key in self._others:
            if left[key[0]] and not (key[0] == layer and key[1] in needed):
                left[key[0]] -= 1
                yield key
