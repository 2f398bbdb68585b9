"""What a predictor hears and what it is asked."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32


@runtime_checkable
class Predictor(Protocol):
    """Says which experts coming layers will use. Called in the order of the decode steps, a few microseconds a layer.

    Probabilities are of use by any of the active sequences. What is wrong in them costs time, never a result.
    """

    def on_step(self, tokens: Sequence[int]) -> None:
        """A decode step begins; `tokens` are the ids that the active sequences take in, in batch order."""
        ...

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """The router of `layer` chose the experts `rows[b]` for the b-th active sequence."""
        ...

    def predict(self, layer: int, distance: int) -> Float32[np.ndarray, "E"]:
        """How likely each expert of layer `layer + distance` is to be used, after `on_route` of `layer`.

        Args:
          layer: MoE layer that runs.
          distance: 1 to L; past the last layer comes the first, of the next step.
        """
        ...

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        """How likely the running step is to use each key, after its `on_step`."""
        ...
