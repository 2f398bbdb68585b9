"""Which blocks to fetch on predictions, and when to give up on them: ids only."""

import itertools
from collections.abc import Sequence
from typing import Generic

import numpy as np

from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.link import Blocks, PrefetchLink


class Prefetcher(Generic[Blocks]):
    """Fills what demand copies leave of a link with the blocks that coming layers are likely to use.

    The plan is made anew at every layer. What the link has not begun by then is withdrawn, and its slots are the first
    to be given out again, to the layer's misses if it has any. So a stale prefetch costs no copy, and a plan is never
    longer than what the link can begin before the next one.

    Args:
      residency: which block is where.
      link: copies blocks.
      predictor: how likely each expert is to be used.
      horizon: layers ahead that are planned for, 1 to L; past the last layer comes the first, of the next token.
      threshold: the least probability of use that is worth a copy. Above one half, a copy is used more often than
        not.
    """

    def __init__(
        self,
        residency: Residency,
        link: PrefetchLink[Blocks],
        predictor: Predictor,
        *,
        horizon: int,
        threshold: float = 0.5,
    ) -> None:
        self._residency, self._link, self._predictor = residency, link, predictor
        self.horizon, self.threshold = horizon, threshold

    @property
    def begun(self) -> int:
        """Prefetches that have begun so far."""
        return self._link.prefetches_begun

    def gate(self) -> None:
        """A layer is about to ask: drop what has not begun, take note of what has arrived."""
        for key in self._link.withdraw():
            self._residency.cancel(*key)
        for key in self._link.arrived():
            self._residency.arrive(*key)

    def plan(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """Queue prefetches for the layers after `layer`, whose experts `rows` have their slots and keep them.

        Nearer layers come first, then likelier experts. Layers that run before the one that a block is for lose
        nothing for it, and none that is likely to be used leaves for another of its layer.
        """
        room = self._link.window()
        residency, layers = self._residency, self._residency.layers
        keys: list[Key] = []
        slots: list[int] = []
        closed: list[int] = []
        ahead = self._predictor.ahead(layer, self.horizon)
        for distance in range(1, self.horizon + 1):
            if len(keys) >= room:
                break
            closed.append((layer + distance - 1) % layers)
            target = (layer + distance) % layers
            scores = ahead[distance - 1]
            likely = scores >= self.threshold
            absent = (likely & (residency.slot_of[target] < 0)).nonzero()[0]
            if not absent.size:
                continue
            keep = likely.nonzero()[0].tolist()
            if target == layer:
                keep += itertools.chain.from_iterable(rows)
            for expert in absent[np.argsort(-scores[absent], kind="stable")].tolist():
                slot = residency.reserve(target, expert, keep=keep, closed=closed)
                if slot is not None:
                    keys.append((target, expert))
                    slots.append(slot)
                    if len(keys) == room:
                        break
        self._link.prefetch(keys, slots)

    def wait(self, layer: int, experts: Sequence[int]) -> None:
        """Wait for blocks in flight that the running step needs."""
        self._link.wait([(layer, expert) for expert in experts])
        for expert in experts:
            self._residency.arrive(layer, expert, used=True)

    def drain(self) -> None:
        """Leave nothing in flight."""
        self.gate()
        keys = self._residency.in_flight
        self._link.wait(keys)
        for key in keys:
            self._residency.arrive(*key)
