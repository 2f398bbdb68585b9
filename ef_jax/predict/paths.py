"""Prediction from the tokens' paths: what they use in all layers, as soon as they are known."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt16

from ef_jax.predict.calibration import LEVEL_SHIFT, LEVELS, USED, Calibration, levels
from ef_jax.predict.history import History
from ef_jax.predict.log_odds import BINS

_EARLY = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # steps at which all tables are renewed
_SETTLED = 64  # the step from which on they take turns
_LONGEST_INTERVAL = 32  # steps from one turn to the next


class Paths(History):
    """Predicted paths, calibrated, in the steps that have any; `History` in the others, and for a next step without.

    A path predictor may claim too much, and claims add up over a batch. So what it says of an expert is held against
    the frequency with which experts of which it said the same were used, layer by layer, as the steps go by
    (`Calibration`), told apart by what `History` expects of them. Paths that say nothing, or the opposite of what
    happens, end up at the level's own frequency.

    Args:
      layers: MoE layers, L.
      experts: experts a layer, E.
      top_k: experts that a token uses, K.
    """

    def __init__(self, *, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers=layers, experts=experts)
        self._usual, self._count = top_k / experts, 0
        self._of_paths = Calibration(layers=layers, distances=1)
        self._path_table = self._of_paths.tables.reshape(-1)
        self._first_kinds = np.arange(layers)[:, None] * (LEVELS * BINS)
        self._paths: UInt8[np.ndarray, "L E"] | None = None  # of this step
        self._following: Float32[np.ndarray, "L E"] | None = None  # probabilities of the next one
        self._path_marks = np.zeros((layers, experts), np.uint16)
        self._paths_seen = self._paths_learned = 0

    def on_step(self, tokens: Sequence[int]) -> None:
        super().on_step(tokens)
        self._count += 1
        self._paths = self._following = None
        if self._paths_seen and due(self._count, 1):
            self._of_paths.learn(1, self._paths_seen - self._paths_learned)
            self._paths_learned = self._paths_seen

    def on_paths(self, bins: UInt8[np.ndarray, "L E"], following: UInt8[np.ndarray, "L E"] | None = None) -> None:
        self._paths = bins
        self._paths_seen += 1
        level = levels(self._this, self._usual)
        np.left_shift(level, LEVEL_SHIFT, out=self._path_marks)
        self._path_table.take(self._places(level, bins), out=self._this, mode="clip")
        if following is not None:
            places = self._places(levels(self._next, self._usual), following)
            self._following = self._path_table.take(places, mode="clip")
            self._next[:] = self._following

    def on_route(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._learn_path(layer, self._use(layer, rows))

    def _use(self, layer: int, rows: Sequence[Sequence[int]]) -> Int64[np.ndarray, "n"]:
        used = super()._use(layer, rows)
        if self._following is not None:
            self._next[layer] = self._following[layer]  # what this step uses says less of it
        return used

    def _places(self, level: UInt16[np.ndarray, "L E"], bins: UInt8[np.ndarray, "L E"]) -> Int64[np.ndarray, "L E"]:
        """Where the bins of experts are in a table by layer, level and bin."""
        places = level * np.int64(BINS)
        places += bins
        places += self._first_kinds
        return places

    def _learn_path(self, layer: int, used: Int64[np.ndarray, "n"]) -> None:
        if self._paths is not None:
            marks = self._path_marks[layer]
            marks[used] |= USED
            self._of_paths.observe(layer, 1, self._paths[layer], marks)


def due(step: int, tables: int) -> Sequence[int]:
    """Which of some tables are renewed at a step: all of them now and then at first, later they take turns."""
    if step < _SETTLED:
        return range(tables) if step in _EARLY else ()
    interval = min(step // 16, _LONGEST_INTERVAL)
    return () if step % interval else (step // interval % tables,)
