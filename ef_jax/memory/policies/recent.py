"""What policies share that order keys by the time of their last use."""

import numpy as np
from jaxtyping import Int

from ef_jax.memory.policies.base import most_used
from ef_jax.memory.policies.ranked import Ranked, views


class Recent(Ranked):
    """Keeps the time of each key's last use; within a layer of a step, experts of the first ranks are the latest.

    Attributes:
      last: `[L, E]`; 0: never used.
      last_of: its rows, for single numbers.
      clock: time of the latest use.
      before: time at which the running layer began.
    """

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        super().__init__(layers=layers, experts=experts, cache_slots=cache_slots)
        self.last = np.zeros((layers, experts))
        self.last_of = views(self.last)
        self.clock = self.before = 0

    def on_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        used = most_used(counts)
        self.last[layer, used[::-1]] = self.clock + 1 + np.arange(len(used))  # the most used the latest
        self.clock += len(used)

    def on_enter(self, layer: int, expert: int) -> None:
        super().on_enter(layer, expert)
        if self.last_of[layer][expert] < self.before:  # it was not asked for: as recent as the layer before
            self.last_of[layer][expert] = self.before
