"""The leading principal components of routing, found while it goes on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

_MEAN_STEPS = 1024  # steps that the mean of the components reaches back


class RoutingComponents:
    """What all layers routed to last, in a few numbers: its leading principal components, less their mean.

    The basis is found by subspace iteration: a sketch, the covariance of the steps seen times the basis, runs along,
    and now and then the basis turns to the sketch's own principal axes.

    Products are taken a chunk of keys at a time: small enough that a BLAS library does not spread them over threads,
    which would fight with those of the running model (a product of 1 ms took 30 ms then).

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.
      rank: components, R.
      chunks: number of equal parts that the L * E keys are taken in, C.

    Attributes:
      now: `[R]`, of the last routes of every layer, running step included.
    """

    def __init__(self, *, layers: int, experts: int, rank: int, chunks: int) -> None:
        keys = layers * experts
        random = np.random.default_rng(0)
        self._basis = np.linalg.qr(random.standard_normal((keys, rank)))[0].astype(np.float32)
        self._chunked = (chunks, keys // chunks, rank)
        self._sketch = np.zeros(self._chunked, np.float32)
        self._mean = np.zeros(rank, np.float32)
        self._base = [layer * experts for layer in range(layers)]
        self._last: list[list[int]] = [[] for _ in range(layers)]
        self._signs: dict[tuple[int, int], np.ndarray] = {}
        self._change = np.empty(rank, np.float32)
        self.now = np.zeros(rank, np.float32)

    def move(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` has routed to `experts`; one that several sequences chose counts as often."""
        base, before = self._base[layer], self._last[layer]
        self._last[layer] = after = [base + expert for expert in experts]
        shape = len(after), len(before)
        signs = self._signs.get(shape)
        if signs is None:
            signs = self._signs[shape] = np.repeat(np.array([1, -1], np.float32), shape)
        np.dot(signs, self._basis.take(after + before, axis=0), out=self._change)
        self.now += self._change

    def end_step(self, steps: int) -> None:
        """Let the mean follow, after the step that makes them `steps`."""
        rate = np.float32(max(1 / (steps + 1), 1 / _MEAN_STEPS))
        self._mean += rate * self.now
        self.now *= 1 - rate

    def learn(self, used: Float32[np.ndarray, "C n keys"], *, keep: float) -> None:
        """Take n steps into the sketch: what they used, less its frequency. `keep`: of what is there, what stays."""
        self._sketch *= np.float32(keep)
        components = np.matmul(used, self._basis.reshape(self._chunked)).sum(axis=0)
        self._sketch += np.matmul(used.transpose(0, 2, 1), components)

    def turn(self) -> Float32[np.ndarray, "rank rank"]:
        """Turn the basis to the principal axes found by now.

        Returns:
          The matrix that takes components in the old basis (as rows, from the right) to the new one.
        """
        sketch = self._sketch
        square = np.matmul(sketch.transpose(0, 2, 1), sketch).sum(axis=0, dtype=np.float64)
        spread, axes = np.linalg.eigh(square)
        spread = np.maximum(spread, max(spread[-1], 1e-30) * 1e-9)
        basis = np.matmul(sketch, (axes / np.sqrt(spread)).astype(np.float32))
        turn: Float32[np.ndarray, "rank rank"]
        turn = np.matmul(self._basis.reshape(self._chunked).transpose(0, 2, 1), basis).sum(axis=0)
        self._basis, self._sketch, self._mean = (
            basis.reshape(self._basis.shape),
            np.matmul(sketch, turn),
            self._mean @ turn,
        )
        self.now = self._basis[[key for last in self._last for key in last]].sum(0) - self._mean
        return turn
