"""Prediction by reading on in the trace: for replays, to study schedulers at a given accuracy."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float32

from ef_jax.errors import InputError

Routes = Sequence[Sequence[Sequence[int]]]


class Oracle:
    """Knows the coming decode steps, or a part of them.

    With `recall` below 1 each expert that a step will use is left out with probability `1 - recall`, and for each
    that is left out another, which the step will not use, is named in its place. The experts that are named have the
    probability `recall`, the others 0, so the probabilities are true ones.

    Args:
      steps: the decode steps that will be run, in order: `[L][B][K]` expert ids each. Read one step ahead.
      layers: MoE layers, L.
      experts: experts a layer, E.
      recall: share of the truth that is told.
      seed: of what is left out and what is named instead.

    Raises:
      InputError: `recall` is not a share.
    """

    def __init__(
        self, steps: Iterable[Routes], *, layers: int, experts: int, recall: float = 1.0, seed: int = 0
    ) -> None:
        if not 0 <= recall <= 1:
            raise InputError(f"recall {recall}: give a share from 0 to 1")
        self._steps = iter(steps)
        self._shape = layers, experts
        self._recall = recall
        self._random = np.random.default_rng(seed)
        self._now, self._next = np.zeros(self._shape, np.float32), self._read()

    def on_step(self, tokens: Sequence[int]) -> None:
        self._now, self._next = self._next, self._read()

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int, distance: int) -> Float32[np.ndarray, "E"]:
        target, layers = layer + distance, self._shape[0]
        return self._now[target] if target < layers else self._next[target - layers]

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        return self._now

    def _read(self) -> Float32[np.ndarray, "L E"]:
        """What is told of the next step of the trace; nothing past its end."""
        truth = np.zeros(self._shape, bool)
        for row, routes in zip(truth, next(self._steps, ()), strict=False):
            row[list(itertools.chain.from_iterable(routes))] = True
        told = truth if self._recall == 1 else self._distort(truth)
        return told * np.float32(self._recall)

    def _distort(self, truth: Bool[np.ndarray, "L E"]) -> Bool[np.ndarray, "L E"]:
        draw = self._random.random(self._shape)
        kept = truth & (draw < self._recall)
        order = np.argsort(np.where(truth, 2, draw), axis=1)
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(self._shape[1])[None], axis=1)
        left_out = (truth & ~kept).sum(axis=1, keepdims=True)
        return kept | (~truth & (rank < left_out))
