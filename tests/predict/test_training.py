"""A correction learns what can be learned, from sequences that it is not judged by."""

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.nn.correction import Correction, CorrectionSpec
from ef_jax.predict.correction_bins import correction_bins
from ef_jax.predict.training import Training, TrainingOptions, train
from ef_jax.predict.training_data import Examples, aimed, counts_before
from tests.predict.learnable import learnable

SPEC = CorrectionSpec(layers=3, experts=8, top_k=2, distances=2, vocab=16, width=16)
OPTIONS = TrainingOptions(steps=120, batch=128, learning_rate=3e-2, evaluations=6)


@pytest.fixture(scope="module")
def trained() -> tuple[Correction, Training, list[Any]]:
    reports: list[Any] = []
    correction, training = train(SPEC, Examples([learnable()]), OPTIONS, lambda *words: reports.append(words))
    return correction, training, reports


def test_recall_rises_on_sequences_held_out(trained: tuple[Correction, Training, list[Any]]) -> None:
    _, training, reports = trained
    counts = aimed(3, 2)
    assert np.isnan(training.recall_after[~counts]).all()
    before, after = (recall[counts].mean() for recall in (training.recall_before, training.recall_after))
    assert before < 0.4
    assert after > 0.9
    assert training.tokens + training.held_out_tokens == 24 * 64
    assert 64 <= training.held_out_tokens <= 4 * 64
    assert len(reports) == reports[-1][0] == training.steps <= 120
    assert reports[-1][2].loss < reports[0][2].loss


def test_bins_of_another_trace_say_what_is_used(trained: tuple[Correction, Training, list[Any]]) -> None:
    trace = learnable(sequences=2, seed=5)
    bins = correction_bins(trained[0], trace)
    assert bins.shape == (128, 3, 3, 8)
    assert bins.dtype == np.uint8
    for source, distance in np.ndindex(3, 3):
        layer = source - 1 + distance
        here = bins[:, source, distance]
        if not 0 <= layer < 3 or (distance, source) == (0, 0):
            assert not here.any()
            continue
        best = np.argsort(-here.astype(int), axis=1, kind="stable")[:, :2]
        hits = np.mean([np.isin(b, e).mean() for b, e in zip(best, trace.experts[:, layer], strict=True)])
        assert hits == 1 if distance == 0 else hits > 0.9
        used = np.take_along_axis(here, trace.experts[:, layer].astype(int), axis=1)
        assert (used >= 128).mean() > 0.8


def test_without_an_input_its_columns_stay_zero() -> None:
    examples = Examples([learnable(sequences=12)])
    options = dataclasses.replace(OPTIONS, steps=5, without=("token", "history"))
    correction, _ = train(SPEC, examples, options)
    enter = np.asarray(correction.enter.get_value())
    assert not enter[:, :, SPEC.columns["token"]].any()
    assert not np.asarray(correction.history_scale.get_value()).any()
    assert enter[:, :, SPEC.columns["past"]].any()


def test_counts_before_a_token_decay_within_its_sequence() -> None:
    trace = learnable(sequences=3, length=5)
    trace = dataclasses.replace(trace, offsets=np.array([0, 2, 9, 15]))
    counts = counts_before(trace, (0.0, 0.5))
    for begin, end in ((0, 2), (2, 9), (9, 15)):
        now = np.zeros((2, 3, 8))
        for row in range(begin, end):
            np.testing.assert_allclose(counts[row], now, atol=1e-3)
            used = np.zeros((3, 8))
            np.put_along_axis(used, trace.experts[row].astype(int), 1, axis=1)
            now = np.array([0, 0.5])[:, None, None] * now + np.array([1, 0.5])[:, None, None] * used


def test_traces_are_numbered_through() -> None:
    traces = [learnable(sequences=2, length=8, seed=seed) for seed in (1, 2)]
    examples = Examples(traces)
    assert examples.offsets.tolist() == [0, 8, 16, 24, 32]
    inputs = examples.inputs(np.array([0, 15, 16, 31]), SPEC)
    np.testing.assert_array_equal(inputs.tokens, [*traces[0].tokens[[0, 15]], *traces[1].tokens[[0, 15]]])
    assert (np.asarray(inputs.before)[[0, 2]] == -1).all()
    np.testing.assert_array_equal(np.asarray(inputs.before)[3], traces[1].experts[14])
    learned, held = examples.split(0.25, 0)
    assert (len(learned), len(held)) == (24, 8)


def test_the_same_seed_trains_the_same() -> None:
    options = dataclasses.replace(OPTIONS, steps=4)
    first, second = (train(SPEC, Examples([learnable()]), options)[0] for _ in range(2))
    np.testing.assert_array_equal(first.enter.get_value(), second.enter.get_value())


def test_what_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(learnable(), pregate=None)
    with pytest.raises(InputError, match="trace 2 of 2 has no pre-gate scores: record it with ef-jax trace --pregate"):
        Examples([learnable(), plain])
    with pytest.raises(InputError, match="trace 2 has 4 layers x 8 experts, top-2, 2 distances, and the first has 3"):
        Examples([learnable(), learnable(layers=4)])
    with pytest.raises(InputError, match="one sequence, and some must be held out"):
        train(SPEC, Examples([learnable(sequences=1, length=900)]), OPTIONS)
    with pytest.raises(InputError, match="64 tokens to learn from are too few"):
        train(SPEC, Examples([learnable(sequences=2)]), OPTIONS)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        TrainingOptions(steps=0)
    with pytest.raises(InputError, match="held_out must be a share"):
        TrainingOptions(held_out=1.0)
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(InputError, match=r'training needs optax: pip install "ef_jax\[train\]"'):
        train(SPEC, Examples([learnable()]), OPTIONS)
