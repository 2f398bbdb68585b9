"""What the next use of a key is worth, learned online from routing alone."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from ef_jax.memory.policies.ranked import views
from ef_jax.memory.policies.routing_components import RoutingComponents

_DECAYS = np.array([0, 0.5, 0.8, 0.93, 0.98, 0.995, 0.9995], np.float32)  # of the frequencies, a step
_RANK = 60
_BLOCK = 32  # steps between two fits of the map
_MAP_STEPS = 8192  # that the map's statistics reach back
_MAP_PRIOR = 128.0  # strength of the map's ridge, in steps
_WEIGHT_STEPS = 1024  # that the weights' statistics reach back
_CHUNK = 128  # keys in a product at most; with so many rows, the threads of `RoutingComponents` are still not woken
_LEAST = np.array(0.01, np.float32)  # values below count as this


class UseValue:
    """The value of every key: E[exp(-T / life)], where T counts the visits of its layer until one uses it.

    Values are learned in two stages, both by ridge regression, for a target that bootstraps (temporal difference):
    `exp(-1 / life)` times 1 if the next step uses the key, else times the value that the key has after that step.

    1. A linear map takes the leading components of the routing, that is of what every layer chose last, to every key.
       It learns what the second stage leaves of the target without it.
    2. Weights, the same for all keys, of a key's decayed frequencies of use and of its output of the map. They are
       fitted on steps that the map has not seen, so a map that has learned nothing counts for nothing.

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.

    Attributes:
      values: `[L, E]`, of every key at the end of the last step.
    """

    def __init__(self, *, layers: int, experts: int) -> None:
        keys = layers * experts
        # Keys are taken in C chunks of W neighbours, parts of a layer, see `RoutingComponents`.
        self._width = width = max(n for n in range(1, _CHUNK + 1) if experts % n == 0)
        chunks, self._parts = keys // width, experts // width
        self._shape, self._chunked = (layers, experts), (chunks, width)
        rank, decays = min(_RANK, keys), len(_DECAYS)
        self._components = RoutingComponents(layers=layers, experts=experts, rank=rank, chunks=chunks)
        # Of each chunk the map, the frequencies, ones and the running step's uses: its values are one product.
        self._stack = np.zeros((chunks, rank + decays + 2, width), np.float32)
        self._stack[:, -2] = 1
        self._map, self._frequencies, self._used = self._stack[:, :rank], self._stack[:, rank:-2], self._stack[:, -1]
        self._row = np.empty(experts, np.float32)
        self._used_cells = views(self._used)
        self._layers = [
            list(zip(self._stack[first : first + self._parts], self._row.reshape(-1, width), strict=True))
            for first in range(0, chunks, self._parts)
        ]
        self._mix = np.zeros(rank + decays + 2, np.float32)
        self._map_mix = self._mix[:rank]
        self._seen = self._steps = 0
        # The second stage: weights of the frequencies, the map's output, one; at first the mean of the frequencies.
        self._prior = np.array([1 / decays] * decays + [0, 0])
        self._prior_strength = np.array([100.0] * decays + [0.1, 100.0])
        self._weights = self._prior.astype(np.float32)
        self._gram, self._moment = np.zeros((decays + 2, decays + 2)), np.zeros(decays + 2)
        self._before: tuple[np.ndarray, np.ndarray] | None = None  # features and components after the last step
        # The first stage, and the steps that wait to be taken into it.
        self._map_gram = np.zeros((rank, rank), np.float32)
        self._map_moment = np.zeros((chunks, rank, width), np.float32)
        self._block_components = np.zeros((_BLOCK, rank), np.float32)
        self._block_rest = np.zeros((chunks, _BLOCK, width), np.float32)
        self._block_used = np.zeros((chunks, _BLOCK, width), np.float32)
        self._filled, self._turn_at = 0, _BLOCK
        self.values = np.full(self._shape, _LEAST, np.float32)
        self._prepare()

    def route(self, layer: int, experts: Sequence[int]) -> Float32[np.ndarray, "E"]:
        """Values of the keys of `layer` after its visit, which chose `experts` (of all sequences, repeats included).

        The array that is returned holds them until the next call.
        """
        components, used, first = self._components, self._used_cells, layer * self._parts
        for expert in experts:
            part, place = divmod(expert, self._width)
            used[first + part][place] = 1.0
        components.move(layer, experts)
        np.multiply(components.now, self._map_weight, out=self._map_mix)
        for stack, row in self._layers[layer]:
            np.dot(self._mix, stack, out=row)
        return np.maximum(self._row, _LEAST, out=self._row)

    def prompt(self, layer: int, counts: Int[np.ndarray, "E"], rows: int) -> None:
        """Prompts of `rows` tokens used each expert so often: the frequencies follow as they would in so many steps."""
        rate = np.maximum(1 - _DECAYS**rows, np.float32(rows / (self._seen + rows)))[:, None]
        frequencies = self._frequencies[layer * self._parts : (layer + 1) * self._parts]
        shares = counts.reshape(-1, 1, self._width).astype(np.float32) / np.float32(rows)
        frequencies += rate * (shares - frequencies)
        if layer == self._shape[0] - 1:
            self._seen += rows
            self._prepare()
            self.values = np.maximum(np.matmul(self._mix, self._stack), _LEAST).reshape(self._shape)

    def end_step(self, life: float) -> None:
        """Every layer has routed: value every key by all that is known, and learn from what the step used."""
        self._seen += 1
        self._steps += 1
        decays, used = len(_DECAYS), self._used.copy()
        self._frequencies += self._rate[:, None] * (used[:, None] - self._frequencies)
        features = np.empty((len(used), decays + 2, self._width), np.float32)
        features[:, :decays] = self._frequencies
        features[:, decays] = np.matmul(self._components.now, self._map)
        features[:, -1] = 1
        values = np.matmul(self._weights, features)
        np.maximum(values, _LEAST, out=values)
        self.values = values.reshape(self._shape)
        if self._before is not None:
            target = np.maximum(np.minimum(values, 1), used)
            target *= np.float32(math.exp(-1 / life))
            self._fit_weights(self._before[0], target)
            self._note(*self._before, target, used - features[:, decays - 1])
            if self._filled == _BLOCK:
                self._fit_map()
        self._before = features, self._components.now.copy()
        self._components.end_step(self._steps)
        self._used[:] = 0
        self._prepare()

    def _prepare(self) -> None:
        """What the coming step's `route` multiplies by: the weights, of frequencies that the step has yet to move."""
        decays = len(_DECAYS)
        self._rate = np.maximum(1 - _DECAYS, np.float32(1 / (self._seen + 1)))  # first the plain mean
        weights = self._weights[:decays]
        self._mix[-2 - decays :] = [*weights * (1 - self._rate), self._weights[-1], weights @ self._rate]
        self._map_weight = np.array(self._weights[decays])

    def _note(
        self,
        features: Float32[np.ndarray, "C n W"],
        components: Float32[np.ndarray, "rank"],
        target: Float32[np.ndarray, "C W"],
        used: Float32[np.ndarray, "C W"],
    ) -> None:
        """Keep a step for the next fit of the map."""
        weights = self._weights.copy()
        weights[len(_DECAYS)] = 0
        rest = (target - np.matmul(weights, features)).reshape(self._shape)
        rest -= rest.mean(1, keepdims=True)  # a layer's routes add up to the same every time
        self._block_rest[:, self._filled] = rest.reshape(self._chunked)
        self._block_used[:, self._filled] = used
        self._block_components[self._filled] = components
        self._filled += 1

    def _fit_weights(self, features: Float32[np.ndarray, "C n W"], target: Float32[np.ndarray, "C W"]) -> None:
        """The second stage; every other step is enough once there have been some."""
        steps = self._steps
        if steps > 2 * _BLOCK and steps % 2:
            return
        keep = 1 - 1 / min(_WEIGHT_STEPS, steps + 1)
        self._gram = keep * self._gram + np.matmul(features, features.swapaxes(1, 2)).sum(axis=0)
        self._moment = keep * self._moment + np.matmul(features, target[:, :, None]).sum(axis=0)[:, 0]
        if steps < _BLOCK or steps % 8 == 0:
            strength = self._prior_strength
            weights = np.linalg.solve(self._gram + np.diag(strength), self._moment + strength * self._prior)
            self._weights = weights.astype(np.float32)

    def _fit_map(self) -> None:
        """The first stage, from the steps noted since the last fit and, fading, those before."""
        steps, self._filled = self._steps, 0
        keep = 1 - min(_BLOCK / _MAP_STEPS, 0.5)
        components = self._block_components
        self._map_gram = keep * self._map_gram + components.T @ components
        self._map_moment *= np.float32(keep)
        self._map_moment += np.matmul(components.T, self._block_rest)
        self._components.learn(self._block_used, keep=keep)
        if steps >= self._turn_at:
            self._turn_at = steps + min(8 * _BLOCK, max(_BLOCK, steps // 4))
            turn = self._components.turn()
            self._map_gram = turn.T @ self._map_gram @ turn
            self._map_moment = np.matmul(turn.T, self._map_moment)
        gram, rank = self._map_gram.astype(np.float64), len(self._map_gram)
        ridge = _MAP_PRIOR * np.trace(gram) / (rank * min(steps, _MAP_STEPS)) + 1e-6
        inverse = np.linalg.inv(gram + ridge * np.eye(rank)).astype(np.float32)
        self._map[:] = np.matmul(inverse, self._map_moment)
