"""How good predictions are: recall by layer and distance, online, against two controls."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ef_jax.predict.log_odds import BINS


class Accuracy:
    """Recall of scores: of the n distinct experts that a layer of a step used, the share among the n best scored.

    For one sequence that is recall@k. Where equal bins straddle the n-th place, each counts for its chance to be in.
    One distance a layer and step is looked at, in turn.

    Two controls: distance 0, the layer's own scores, which must read 1; and the experts that the step before used in
    the layer, counted as if they had been predicted. At distance 0 an expert is found if its log-odds are positive,
    which for one sequence is the same as being among the n best, and holds in batches too.

    Args:
      layers: MoE layers, L.
      distances: distances for which bins come, H.
    """

    def __init__(self, *, layers: int, distances: int) -> None:
        self._layers, self._distances = layers, distances
        self._held: list[UInt8[np.ndarray, "distances E"] | None] = [None] * (layers + 1)  # of this step, by source
        self._before: list[frozenset[int]] = [frozenset()] * layers
        self._steps = 0
        self._found = [[0.0] * (distances + 1) for _ in range(layers)]
        self._used = [[0] * (distances + 1) for _ in range(layers)]
        self._repeated, self._repeatable = [0] * layers, [0] * layers

    def on_step(self) -> None:
        """A decode step begins."""
        self._held = [None] * (self._layers + 1)
        self._steps += 1

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        """See `Predictor.on_ahead`."""
        self._held[layer + 1] = bins

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """See `Predictor.on_route`."""
        used = frozenset(rows[0] if len(rows) == 1 else itertools.chain.from_iterable(rows))
        count = len(used)
        if before := self._before[layer]:
            self._repeated[layer] += len(used & before)
            self._repeatable[layer] += count
        self._before[layer] = used
        distance = (self._steps + layer) % (min(self._distances, layer + 1) + 1)
        bins = self._held[layer + 1 - distance]
        if bins is None or not used:
            return
        scores = bins[distance]
        if not distance:
            self._own(layer, scores, used)
            return
        best = np.partition(scores, len(scores) - count)[len(scores) - count :].tobytes()
        least = best[0]
        of_expert = scores.tobytes()
        chance = best.count(least) / of_expert.count(least)
        for expert in used:
            score = of_expert[expert]
            if score >= least:
                self._found[layer][distance] += 1.0 if score > least else chance
        self._used[layer][distance] += count

    def _own(self, layer: int, scores: UInt8[np.ndarray, "E"], used: frozenset[int]) -> None:
        if scores.any():  # a trace that is replayed may have no scores of this distance
            self._found[layer][0] += sum(score >= BINS // 2 for score in scores[list(used)].tolist())
            self._used[layer][0] += len(used)

    def report(self) -> dict[str, Any]:
        """Plain JSON types; None where nothing was seen.

        Returns:
          `recall`: by distance from 0 on, over all layers. `recall_by_layer`: `[L][H+1]`. `previous_token` and
          `previous_token_by_layer`: the other control.
        """
        return {
            "recall": [
                _share(sum(found), sum(used))
                for found, used in zip(zip(*self._found, strict=True), zip(*self._used, strict=True), strict=True)
            ],
            "recall_by_layer": [
                [_share(*counts) for counts in zip(found, used, strict=True)]
                for found, used in zip(self._found, self._used, strict=True)
            ],
            "previous_token": _share(sum(self._repeated), sum(self._repeatable)),
            "previous_token_by_layer": [
                _share(*counts) for counts in zip(self._repeated, self._repeatable, strict=True)
            ],
        }


def _share(found: float, of: int) -> float | None:
    return found / of if of else None
