"""What a predictor hears and what it is asked."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8


@runtime_checkable
class Predictor(Protocol):
    """Says which experts coming layers will use. Called in the order of the decode steps, a few microseconds a layer.

    A step begins with `on_step`, then comes `on_paths`, where paths are predicted. Within a layer `on_ahead` comes
    first, where there are bins, then `on_route`, then `ahead`. A layer whose experts are all resident may tell its rows
    only at the end of the step.

    Probabilities are of use by any of the active sequences. What is wrong in them costs time, never a result.
    """

    def on_step(self, tokens: Sequence[int]) -> None:
        """A decode step begins; `tokens` are the ids that the active sequences take in, in batch order."""
        ...

    def on_paths(self, bins: UInt8[np.ndarray, "L E"], following: UInt8[np.ndarray, "L E"] | None = None) -> None:
        """What the tokens of the running step are likely to use in all layers; only in steps for which it is known.

        Args:
          bins: of the active sequences together, as `log_odds.union_bins` gives it. May be kept until the step ends: do
            not write to it.
          following: the same of the step after this one, where other sequences run whose tokens are known.
        """
        ...

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        """What the residual stream at the router of `layer` says of the layers from `layer` on.

        Args:
          layer: MoE layer that runs; -1 for the embeddings of the tokens, at the start of a step.
          bins: row d is about layer `layer + d`, as `log_odds.to_bins` gives it; row 0 of layer -1 and rows past the
            last layer mean nothing. May be kept until the step ends: do not write to it.
        """
        ...

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """The router of `layer` chose the experts `rows[b]` for the b-th active sequence."""
        ...

    def ahead(self, layer: int, horizon: int) -> Float32[np.ndarray, "horizon E"]:
        """How likely each expert of the layers `layer + 1` to `layer + horizon` is to be used.

        Args:
          layer: MoE layer that runs, after its `on_route`; -1 before layer 0.
          horizon: 1 to L; past the last layer come the first ones, of the next step.

        Returns:
          Row d - 1 is of layer `layer + d`. It may be a view that holds until the next call.
        """
        ...

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        """How likely the running step is to use each key, after its `on_step` and, where it comes, `on_paths`."""
        ...
