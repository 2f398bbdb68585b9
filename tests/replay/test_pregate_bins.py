"""Pre-gate bins in replays: what a step hears, and from where."""

import dataclasses

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.predict import History
from ef_jax.predict.log_odds import highest, log_odds, to_bins, union
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import DECODE, PROMPT
from ef_jax.schedule.link_model import LinkModel
from tests.replay.traces import made_up

L, E, K, H = 3, 16, 2, 2
TRACE = made_up(sequences=3, length=12, pregate=H, block_bytes=1000)


def all_bins() -> np.ndarray:
    """What each row says alone, uint8 `[N, L, H+1, E]`, with scores of distance 0 besides those of the trace."""
    random = np.random.default_rng(1)
    scores = np.concatenate([random.standard_normal((TRACE.count, L, 1, E)), TRACE.pregate], axis=2, dtype=np.float32)
    return to_bins(log_odds(scores, K, np), np)


def test_a_step_of_one_sequence_hears_its_row():
    heard = PregateBins(TRACE)
    alone = all_bins()
    assert heard.distances == PregateBins(TRACE, alone).distances == H
    for row in (0, 17):
        bins = heard.of_step([row])
        assert not bins[:, 0].any()
        assert np.abs(bins[:, 1:].astype(int) - alone[row, :, 1:]).max() <= 1
        np.testing.assert_array_equal(PregateBins(TRACE, alone).of_step([row]), alone[row])


def test_a_batch_hears_the_union():
    rows, active = [0, 12, 30], np.ones(3, bool)
    scores = log_odds(TRACE.pregate[rows].astype(np.float32), K, np)
    expected = to_bins(union(scores, active, np), np)
    np.testing.assert_array_equal(PregateBins(TRACE).of_step(rows)[:, 1:], expected)
    alone = all_bins()
    given = PregateBins(TRACE, alone).of_step(rows)
    inside = np.abs(scores).max(axis=0) < 7.5  # bins end at 8
    assert np.abs(given[:, 1:].astype(int) - expected)[inside].max() <= 2
    own = to_bins(highest((alone[rows, :, 0].astype(np.float32) - 127.5) / 16, active, np), np)
    np.testing.assert_array_equal(given[:, 0], own)


class Heard(History):
    """Keeps what it hears."""

    def __init__(self) -> None:
        super().__init__(layers=L, experts=E)
        self.bins: list[tuple[int, np.ndarray]] = []

    def on_ahead(self, layer, bins):
        self.bins.append((layer, bins))


@pytest.mark.parametrize("fit", [0, 1])
def test_every_source_is_heard_before_its_layer(fit):
    """Rows are those of the whole trace, also where a part of it only teaches; prompts are not heard."""
    phases = np.full(TRACE.count, DECODE, np.uint8)
    phases[12:15] = PROMPT
    trace = dataclasses.replace(TRACE, phases=phases)
    heard, alone = Heard(), all_bins()
    simulate(trace, slots=8, predictor=heard, bins=alone, fit=fit)
    decoded = np.flatnonzero(phases == DECODE)
    assert [layer for layer, _ in heard.bins] == [-1, 0, 1] * len(decoded)
    expected = alone[decoded].reshape(-1, H + 1, E)
    np.testing.assert_array_equal(np.stack([bins for _, bins in heard.bins]), expected)


def test_an_object_hears_bins_only_if_they_are_given():
    heard = Heard()
    simulate(TRACE, slots=8, predictor=heard)
    assert not heard.bins


def test_better_bins_stall_less():
    """Bins that tell the truth against those of the recorded scores."""
    truth = np.zeros((TRACE.count, L, H + 1, E), np.uint8)
    for source in range(L):
        for distance in range(1, min(H, L - source) + 1):
            chosen = TRACE.experts[:, source - 1 + distance]
            np.put_along_axis(truth[:, source, distance], chosen.astype(int), 255, axis=-1)
    settings = {"slots": 24, "link": LinkModel(bandwidth=1e6), "compute_seconds": 2e-3, "prefetch": 1}
    stalls = [
        simulate(TRACE, predictor="pregate", bins=bins, **settings).decode.stall_seconds for bins in (truth, None)
    ]
    assert stalls[0] < stalls[1]


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (np.zeros((TRACE.count, L, 3, E), np.float32), r"bins are float32 .* needs uint8"),
        (np.zeros((TRACE.count, L, 3, E + 1), np.uint8), r"shape \(36, 3, 3, 17\), .* uint8 of shape \(36, 3, 3, 16\)"),
        (np.zeros((TRACE.count, L, 1, E), np.uint8), r"needs uint8"),
        (np.zeros((TRACE.count, L, E), np.uint8), r"needs uint8 of shape \(36, 3, 2, 16\)"),
    ],
)
def test_bins_of_another_shape_are_refused(bins, message):
    with pytest.raises(InputError, match=message):
        simulate(TRACE, slots=8, predictor="pregate", bins=bins)


def test_a_trace_without_scores_is_refused():
    bare = dataclasses.replace(TRACE, pregate=None)
    with pytest.raises(InputError, match="no pre-gate scores: record one with ef-jax trace --pregate"):
        simulate(bare, slots=8, predictor="pregate")
