"""What an eviction policy hears and what it is asked: ids only, no arrays of weights, a few microseconds a decision.

Keys are `(layer, expert)` with `layer` counted among the MoE layers. `Residency` calls the hooks in the order of the
model's passes, and the same policy object runs in the engine and in a replay.
"""

# ruff: noqa: B027 (a policy overrides the hooks that it needs)

import abc
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float32, Int

Key = tuple[int, int]


def most_used(counts: Int[np.ndarray, "E"]) -> list[int]:
    """Experts that `counts` gives any uses, the most used first; of equals the first."""
    used: list[int] = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    return used


class Policy(abc.ABC):
    """Says which resident keys give up their slots. The hooks do nothing unless a policy overrides them.

    A policy decides which bytes move, never what the model computes.

    Attributes:
      floor_share: the part of an equal share of the slots that each layer keeps whatever others need. 1.0 splits the
        cache evenly among the layers; 0.0 lets any layer take any slot. Floors keep a policy of one global order from
        falling to zero hits below one token cycle.
      wants_predictions: `on_predict` and `on_ahead` are of use to it.
      gives_way: a prefetch may take the slot of any of its keys that is worth less than the block that comes.
    """

    floor_share: float = 1.0
    wants_predictions: bool = False
    gives_way: bool = True

    def __init__(self, *, layers: int, experts: int, cache_slots: int) -> None:
        self.layers, self.experts, self.cache_slots = layers, experts, cache_slots

    def on_step(self, tokens: Sequence[int]) -> None:
        """A decode step begins; `tokens` are the ids that the active sequences take in, in batch order."""

    def on_predict(self, scores: Float32[np.ndarray, "L E"]) -> None:
        """How likely the running step is to use each key; after `on_step`, where a predictor is at work."""

    def on_ahead(self, layer: int, scores: Float32[np.ndarray, "L E"]) -> None:
        """How likely the layers after `layer` are to use each expert, the nearest first; after `on_route` of `layer`,
        where a predictor has learned something new."""

    def on_horizon(self, layers: float) -> None:
        """Blocks are fetched from so many layers ahead of their own, on average; where any are, at every step."""

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """The router of `layer` chose the experts `rows[b]` for the b-th active sequence; before `victims`."""

    def on_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        """A chunk of prompts used each expert of `layer` for `counts` rows; those that found a slot have entered."""

    def on_enter(self, layer: int, expert: int) -> None:
        """A key got a slot."""

    def on_evict(self, layer: int, expert: int) -> None:
        """A key lost its slot."""

    @abc.abstractmethod
    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        """Who leaves for experts that have no slot, when none is free.

        Args:
          layer: MoE layer that asks.
          missing: its experts without a slot.
          needed: its experts that the step uses, `missing` among them: never victims.
          spare: keys that each layer may lose: those above its floor; of `layer` itself, all.

        Returns:
          One distinct resident key for each of `missing`, in its order; None where the expert is not worth a slot and
          passes through staging.
        """
