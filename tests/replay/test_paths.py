"""Paths of a trace's tokens in replays."""

import dataclasses

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.predict import History
from ef_jax.predict.log_odds import union_bins
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import DECODE, PROMPT
from tests.replay.traces import made_up

L, E, K = 3, 16, 2
TRACE = made_up(sequences=3, length=12, layers=L, experts=E, top_k=K)
PATHS = np.random.default_rng(0).integers(0, 256, (TRACE.count, L, E), dtype=np.uint8)


class Heard(History):
    """Keeps the paths that it hears."""

    def __init__(self) -> None:
        super().__init__(layers=L, experts=E)
        self.paths: list[np.ndarray] = []

    def on_paths(self, bins, following=None):
        self.paths.append(bins)


@pytest.mark.parametrize("fit", [0, 1])
def test_each_step_hears_of_its_own_row(fit):
    """Rows are those of the whole trace, also where a part of it only teaches; prompts are not heard."""
    phases = np.full(TRACE.count, DECODE, np.uint8)
    phases[12:15] = PROMPT
    heard = Heard()
    simulate(dataclasses.replace(TRACE, phases=phases), slots=8, predictor=heard, paths=PATHS, fit=fit)
    np.testing.assert_array_equal(np.stack(heard.paths), PATHS[phases == DECODE])


def test_batches_hear_the_union_of_their_rows():
    heard = Heard()
    simulate(TRACE, slots=8, predictor=heard, paths=PATHS, batch=3)
    expected = [union_bins(PATHS[step.rows]) for step in TRACE.steps(3)]
    np.testing.assert_array_equal(np.stack(heard.paths), np.stack(expected))


def test_none_are_heard_unless_they_are_given():
    heard = Heard()
    simulate(TRACE, slots=8, predictor=heard)
    assert not heard.paths


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (PATHS.astype(np.float32), r"paths are float32 .* needs uint8 of shape \(36, 3, 16\)"),
        (PATHS[1:], r"paths are uint8 of shape \(35, 3, 16\), .* uint8 of shape \(36, 3, 16\)"),
    ],
)
def test_paths_of_another_shape_are_refused(paths, message):
    with pytest.raises(InputError, match=message):
        simulate(TRACE, slots=8, predictor="history", paths=paths)
