"""Prediction by reading on in the trace: for replays, to study schedulers at a given accuracy."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from ef_jax.errors import InputError

Routes = Sequence[Sequence[Sequence[int]]]


class Oracle:
    """Knows the coming decode steps, or a part of them.

    With `recall` below 1 each expert that a step will use is left out with probability `1 - recall`, and for each
    that is left out another, which the step will not use, is named in its place. The experts that are named have the
    probability `recall`, the others 0, so the probabilities are true ones. Where recall falls with distance, what is
    told early stays told: coming nearer adds right experts and drops wrong ones.

    Args:
      steps: the decode steps that will be run, in order: `[L][B][K]` expert ids each. Read one step ahead.
      layers: MoE layers, L.
      experts: experts a layer, E.
      recall: share of the truth that is told; or one share for each distance from 1 on, the last of them for all
        distances beyond.
      seed: of what is left out and what is named instead.

    Raises:
      InputError: `recall` is not a share, or there is none.
    """

    def __init__(
        self,
        steps: Iterable[Routes],
        *,
        layers: int,
        experts: int,
        recall: float | Sequence[float] = 1.0,
        seed: int = 0,
    ) -> None:
        shares = [float(recall)] if isinstance(recall, int | float) else [float(share) for share in recall]
        if not shares:
            raise InputError("recall has no figure: give a share from 0 to 1, or one for each distance")
        for share in shares:
            if not 0 <= share <= 1:
                raise InputError(f"recall {share}: give a share from 0 to 1")
        self._steps = iter(steps)
        self._shape = layers, experts
        self._recall = shares
        self._random = np.random.default_rng(seed)
        self._scores = np.zeros((len(shares), 2 * layers, experts), np.float32)  # of this step, then of the next
        self._nearness = np.minimum(np.arange(layers), len(shares) - 1)
        self._read()

    def on_step(self, tokens: Sequence[int]) -> None:
        layers = self._shape[0]
        self._scores[:, :layers] = self._scores[:, layers:]
        self._read()

    def on_paths(self, bins: UInt8[np.ndarray, "L E"], following: UInt8[np.ndarray, "L E"] | None = None) -> None:
        pass

    def on_ahead(self, layer: int, bins: UInt8[np.ndarray, "distances E"]) -> None:
        pass

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        pass

    def ahead(self, layer: int, horizon: int) -> Float32[np.ndarray, "horizon E"]:
        if len(self._recall) == 1:
            return self._scores[0, layer + 1 : layer + 1 + horizon]
        return self._scores[self._nearness[:horizon], np.arange(layer + 1, layer + 1 + horizon)]

    def step_scores(self) -> Float32[np.ndarray, "L E"]:
        return self.ahead(-1, self._shape[0])

    def _read(self) -> None:
        """Take what is told of the next step of the trace into the scores; nothing past its end."""
        truth = np.zeros(self._shape, bool)
        for row, routes in zip(truth, next(self._steps, ()), strict=False):
            row[list(itertools.chain.from_iterable(routes))] = True
        told = self._scores[:, self._shape[0] :]
        if min(self._recall) == 1:
            told[:] = truth
            return
        draw = self._random.random(self._shape)
        order = np.argsort(np.where(truth, 2, draw), axis=1)
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(self._shape[1])[None], axis=1)
        for named, recall in zip(told, self._recall, strict=True):
            named[:] = self._distort(truth, draw, rank, recall) * np.float32(recall)

    @staticmethod
    def _distort(
        truth: Bool[np.ndarray, "L E"], draw: np.ndarray, rank: np.ndarray, recall: float
    ) -> Bool[np.ndarray, "L E"]:
        kept = truth & (draw < recall)
        left_out = (truth & ~kept).sum(axis=1, keepdims=True)
        return kept | (~truth & (rank < left_out))
