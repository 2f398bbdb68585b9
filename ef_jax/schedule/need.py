"""How many blocks the layers of a step will have to fetch: what the first horizon is worked out from."""

import abc
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
    """The running mean of each layer, whatever the batch."""

    def __init__(self, *, layers: int) -> None:
        self.blocks = np.zeros(layers)
        self.now = np.zeros(layers)
        self._steps = 0

    def begin_step(self, batch: int, diversity: float | None) -> None:
        if self._steps:
            self.blocks += (self.now - self.blocks) / min(self._steps, _MEMORY)
        self._steps += 1

    def fetched(self, layer: int, blocks: int) -> None:
        self.now[layer] = blocks


class DiversityNeed(Need):
    """The running mean of each layer, times what batch size and diversity say of this step.

    ExpertFlow-S (arXiv:2510.26730) takes the diversity of a batch's tokens, sum over pairs |v_i - v_j|^2 of their
    embeddings, for a better sign of its demand than its size. How it enters is not told. Here the blocks of a step,
    over their mean, are regressed on the logarithms of batch size and of diversity (a ridge regression that forgets).
    """

    def __init__(self, *, layers: int) -> None:
        self._mean = MeanNeed(layers=layers)
        self._gram, self._moment = np.diag([0.0, 1.0, 1.0]), np.zeros(3)
        self._features = np.array([1.0, 0.0, 0.0])
        self._center = np.zeros(3)
        self._steps = 0
        self.blocks = np.zeros(layers)

    def begin_step(self, batch: int, diversity: float | None) -> None:
        if self._steps:
            self._learn()
        self._mean.begin_step(batch, diversity)
        self._features = np.array([1.0, math.log(max(batch, 1)), math.log1p(max(diversity or 0.0, 0.0))])
        self._steps += 1
        self.blocks = self._mean.blocks * self._ratio()

    def fetched(self, layer: int, blocks: int) -> None:
        self._mean.fetched(layer, blocks)

    def _ratio(self) -> float:
        weights = np.linalg.solve(self._gram + np.diag([1e-3, 1.0, 1.0]), self._moment)
        return min(max(1.0 + float(weights @ (self._features - self._center)), 0.25), 4.0)

    def _learn(self) -> None:
        """Take the step that has ended into the regression."""
        usual, now = self._mean.blocks.sum(), self._mean.now.sum()
        if not usual:
            return
        features = self._features - self._center
        keep = 1 - 1 / _MEMORY
        self._gram = keep * self._gram + np.outer(features, features)
        self._moment = keep * self._moment + features * (now / usual - 1)
        self._center[1:] += (self._features - self._center)[1:] / min(self._steps, _MEMORY)


NEEDS: dict[str, Callable[..., Need]] = {"mean": MeanNeed, "diversity": DiversityNeed}


def make_need(name: str, *, layers: int) -> Need:
    """The estimate called `name`.

    Raises:
      InputError: no such estimate.
    """
    if name not in NEEDS:
        raise InputError(f"need {name!r:.60} is not one of {', '.join(NEEDS)}")
    return NEEDS[name](layers=layers)
