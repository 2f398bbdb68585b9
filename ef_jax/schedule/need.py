"""How many blocks the layers of a step will have to fetch: what the first horizon is worked out from."""

import abc
import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from ef_jax.errors import InputError

_MEMORY = 64  # steps that the estimates reach back


class Need(abc.ABC):
    """An estimate of the blocks that a layer of a step fetches, on demand and ahead of it, if they are used.

    Attributes:
      blocks: the estimate for each layer of the running step.
    """

    blocks: Float64[np.ndarray, "L"]

    @abc.abstractmethod
    def begin_step(self, batch: int, diversity: float | None) -> None:
        """A step of `batch` tokens begins, whose embeddings have the `diversity` k sum|v|^2 - |sum v|^2."""

    @abc.abstractmethod
    def fetched(self, layer: int, blocks: int) -> None:
        """`layer` has used so many distinct experts that had to be fetched."""


class MeanNeed(Need):
    """The running mean of each layer, whatever the batch.

    Attributes:
      now: what the layers of the running step have fetched.
    """

    def __init__(self, *, layers: int) -> None:
        self.blocks, self.now = np.zeros(layers), np.zeros(layers)
        self._steps = 0

    def begin_step(self, batch: int, diversity: float | None) -> None:
        if self._steps:
            self.blocks += (self.now - self.blocks) / min(self._steps, _MEMORY)
        self._steps += 1

    def fetched(self, layer: int, blocks: int) -> None:
        self.now[layer] = blocks


class BatchNeed(Need):
    """The running mean of each layer, times what batch size, and perhaps diversity, say of this step.

    ExpertFlow-S (arXiv:2510.26730) takes the diversity of a batch's tokens, the sum over pairs of |v_i - v_j|^2 of
    their embeddings, for a better sign of its demand than its size; how it enters is not told. Here the blocks of a
    step, over their mean, are regressed on the logarithms of the two (a ridge regression that forgets).

    On the bundled model, where 1 to 8 sequences take part in a step at random, the mean is 35 % off, this 9.3 % with
    the size alone and 8.7 % with diversity too; among steps of one size diversity gains nothing (`bench.horizon`,
    part "need"). That is too little for the embeddings it needs, so the size alone is the default.

    Args:
      layers: MoE layers, L.
      diversity: heed it.
    """

    def __init__(self, *, layers: int, diversity: bool) -> None:
        self._mean = MeanNeed(layers=layers)
        self._heeds = diversity
        self._gram, self._moment = np.zeros((3, 3)), np.zeros(3)
        self._features, self._center = np.array([1.0, 0.0, 0.0]), np.zeros(3)
        self._steps = 0
        self.blocks = np.zeros(layers)

    def begin_step(self, batch: int, diversity: float | None) -> None:
        if self._steps:
            self._learn()
        self._mean.begin_step(batch, diversity)
        spread = diversity if self._heeds and diversity is not None else 0.0
        self._features = np.array([1.0, math.log(max(batch, 1)), math.log1p(max(spread, 0.0))])
        self._steps += 1
        self.blocks = self._mean.blocks * self._ratio()

    def fetched(self, layer: int, blocks: int) -> None:
        self._mean.fetched(layer, blocks)

    def _ratio(self) -> float:
        """The blocks of this step over their mean."""
        weights = np.linalg.solve(self._gram + np.diag([1e-3, 1.0, 1.0]), self._moment)
        return min(max(1.0 + float(weights @ (self._features - self._center)), 0.25), 4.0)

    def _learn(self) -> None:
        """Take the step that has ended into the regression."""
        usual, now = self._mean.blocks.sum(), self._mean.now.sum()
        self._center[1:] += (self._features - self._center)[1:] / min(self._steps, _MEMORY)
        if not usual:
            return
        features = self._features - self._center
        keep = 1 - 1 / _MEMORY
        self._gram = keep * self._gram + np.outer(features, features)
        self._moment = keep * self._moment + features * (now / usual - 1)


NEEDS: dict[str, Callable[..., Need]] = {
    "mean": MeanNeed,
    "batch": functools.partial(BatchNeed, diversity=False),
    "diversity": functools.partial(BatchNeed, diversity=True),
}


def make_need(name: str, *, layers: int) -> Need:
    """The estimate called `name`.

    Raises:
      InputError: no such estimate.
    """
    if name not in NEEDS:
        raise InputError(f"need {name!r:.60} is not one of {', '.join(NEEDS)}")
    return NEEDS[name](layers=layers)
