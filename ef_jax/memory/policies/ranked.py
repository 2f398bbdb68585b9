"""What policies share that give every key a number: the resident keys of the lowest number leave."""

import abc
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from ef_jax.memory.policies.base import Key, Policy

Rows = slice | Sequence[int]  # layers, as an index of [L, E] arrays

if TYPE_CHECKING:
    Numbers: TypeAlias = memoryview[float]
else:
    Numbers = memoryview  # it takes no parameters at run time before Python 3.14

# Added to the time of a key's last use, or taken from it, this outweighs every difference of times.
TIER = 2.0**50


class Ranked(Policy):
    """Evicts the resident keys that `rank` puts lowest; of equals, the first in the order of layers and experts.

    Keys that were used in the same steps only are equals for a frequency, and the one of the lower layer is older.
    """

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self.absent = np.full((layers, experts), np.inf)  # 0 where resident
        self._absent = views(self.absent)

    @abc.abstractmethod
    def rank(self, layers: Rows) -> Float64[np.ndarray, "N E"]:
        """How much each key of some layers is worth; finite, in an array that the caller may change."""

    def on_enter(self, layer: int, expert: int) -> None:
        self._absent[layer][expert] = 0.0

    def on_evict(self, layer: int, expert: int) -> None:
        self._absent[layer][expert] = np.inf

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        return self.lowest(layer, len(missing), needed, spare)

    def lowest(self, layer: int, count: int, needed: Collection[int], spare: Sequence[int]) -> list[Key | None]:
        """`count` resident keys, the lowest first, of each layer no more than `spare` has it; then None."""
        rows: Rows
        if sum(spare) == spare[layer]:
            losing, rows = [layer], slice(layer, layer + 1)
        else:
            losing = [candidate for candidate, keys in enumerate(spare) if keys]
            rows = losing if len(losing) < self.layers else slice(None)
        values = self.rank(rows)
        values += self.absent[rows]
        if spare[layer]:
            own = Numbers(values[losing.index(layer)])
            for expert in needed:
                own[expert] = np.inf
        flat = values.reshape(-1)
        left = [spare[candidate] for candidate in losing]
        chosen: list[Key | None] = []
        while len(chosen) < count:
            place = int(flat.argmin())
            row, expert = divmod(place, self.experts)
            if not left[row] or flat[place] == np.inf:
                break
            flat[place] = np.inf
            chosen.append((losing[row], expert))
            left[row] -= 1
            if not left[row]:
                values[row] = np.inf
        return chosen + [None] * (count - len(chosen))


def views(table: Float[np.ndarray, "L E"]) -> list[Numbers]:
    """The rows of a table for reading and writing single numbers, at half the price of numpy's indexing."""
    return [Numbers(row) for row in table]


def predicted(scores: Float32[np.ndarray, "L E"]) -> Bool[np.ndarray, "L E"]:
    """Which keys a prediction names: of each layer as many of the most likely as it expects uses; ties come along.

    The probabilities of a layer add up to the number of experts that it expects to use, the N_e of ExpertFlow-S
    (arXiv:2510.26730); no threshold has to be chosen.
    """
    named = np.rint(scores.sum(axis=1)).astype(np.int64).clip(0, scores.shape[1])
    least = np.sort(scores, axis=1)[:, ::-1][np.arange(len(scores)), np.maximum(named, 1) - 1]
    return (scores >= least[:, None]) & (scores > 0) & (named > 0)[:, None]
