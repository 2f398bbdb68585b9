"""A routing path learns what tokens tell, from sequences that it is not judged by; a training can be resumed."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from ef_jax.errors import InputError
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.log_odds import NOMINAL
from ef_jax.predict.path_bins import offline_path_bins
from ef_jax.predict.path_data import PathExamples
from ef_jax.predict.path_metrics import candidates
from ef_jax.predict.path_options import PathTrainingOptions
from ef_jax.predict.path_training import PathTraining, train_path
from ef_jax.replay.trace import PROMPT
from tests.nn.test_routing_path import all_at_once
from tests.predict.learnable import learnable

SPEC = RoutingPathSpec(
    layers=3, experts=8, top_k=2, vocab=16, d_model=16, d_ff=16, heads=2, decoder_layers=1, most_prompt=8, window=8
)
OPTIONS = PathTrainingOptions(
    steps=90, rows=8, stretch=16, learning_rate=3e-2, evaluations=3, dropout=0.1, compute="bfloat16"
)


@pytest.fixture(scope="module")
def trained() -> tuple[RoutingPath, PathTraining, list[Any]]:
    reports: list[Any] = []
    path, training = train_path(SPEC, PathExamples([learnable()]), OPTIONS, lambda *words: reports.append(words))
    return path, training, reports


def test_recall_rises_on_sequences_held_out(trained: tuple[RoutingPath, PathTraining, list[Any]]) -> None:
    _, training, reports = trained
    assert training.recall.shape == (3,)
    assert training.recall.min() > 0.9
    assert training.tokens + training.held_out_tokens == 24 * 64
    assert len(reports) == reports[-1][0] == training.steps <= 90
    assert reports[-1][2].loss < reports[0][2].loss


def test_bins_are_those_of_the_sequences_as_a_whole(trained: tuple[RoutingPath, PathTraining, list[Any]]) -> None:
    path, trace = trained[0], learnable(sequences=2, length=70, seed=5)
    trace = dataclasses.replace(trace, offsets=np.array([0, 4, 140]))
    bins = offline_path_bins(path, trace, prompt=10)
    assert candidates(bins, trace)[0].recall.min() > 0.9
    parts = [slice(0, 3), slice(4, 14), slice(14, 140), slice(3, 4)]
    prompts, tokens = np.zeros((4, 8), np.int32), np.zeros((4, 126), np.int32)
    prompts[2], prompts[3, :3] = trace.tokens[6:14], trace.tokens[:3]
    for row, part in enumerate(parts):
        tokens[row, : part.stop - part.start] = trace.tokens[part]
    odds = all_at_once(path, jax.numpy.asarray(prompts), jax.numpy.array([0, 0, 8, 3]), jax.numpy.asarray(tokens))
    for part, wanted in zip(parts, np.asarray(jax.nn.sigmoid(odds)), strict=True):
        near = NOMINAL[bins[part]] - wanted[: part.stop - part.start]
        assert np.abs(near).max() < 0.017  # half a bin at its widest
    recorded = dataclasses.replace(trace, phases=np.where(np.arange(140) < 14, PROMPT, 1).astype(np.uint8))
    np.testing.assert_array_equal(offline_path_bins(path, recorded)[14:], bins[14:])


def test_a_training_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    examples = PathExamples([learnable(sequences=10)])
    whole, training = train_path(SPEC, examples, OPTIONS)

    class Interrupted(Exception):
        pass

    def interrupt(done: int, *_: Any) -> None:
        if done == 40:
            raise Interrupted

    checkpoint = tmp_path / "P.training.npz"
    with pytest.raises(Interrupted):
        train_path(SPEC, examples, OPTIONS, interrupt, checkpoint=checkpoint)
    steps: list[int] = []
    resumed, after = train_path(
        SPEC, examples, OPTIONS, lambda done, *_: steps.append(done), checkpoint=checkpoint, resume=True
    )
    assert steps == list(range(31, 91))
    assert whole.head[...].dtype == np.float32
    assert (after.loss, after.steps) == (training.loss, training.steps)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(whole))

    def error(**changes: Any) -> str:
        with pytest.raises(InputError) as caught:
            train_path(
                dataclasses.replace(SPEC, **changes.pop("spec", {})),
                examples,
                dataclasses.replace(OPTIONS, **changes),
                checkpoint=checkpoint,
                resume=True,
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is of other traces or options" in error(learning_rate=1e-3)
    assert "is of another training" in error(spec={"d_ff": 8})
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert "is damaged" in error()
    checkpoint.unlink()
    assert "there is no checkpoint" in error()


def test_what_cannot_be_trained_on(
    trained: tuple[RoutingPath, PathTraining, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="trace 2 has 4 layers x 8 experts, top-2, and the first has 3 layers"):
        PathExamples([learnable(), learnable(layers=4)])
    with pytest.raises(InputError, match="one sequence, and some must be held out"):
        train_path(SPEC, PathExamples([learnable(sequences=1, length=900)]), OPTIONS)
    with pytest.raises(InputError, match="64 tokens to learn from are too few"):
        train_path(SPEC, PathExamples([learnable(sequences=2)]), OPTIONS)
    for change, message in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": -1.0}, "epochs must be above 0, got -1"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"word_dropout": 1.0}, "word_dropout must be a share from 0"),
        ({"compute": "int8"}, "compute must be bfloat16 or float32, got 'int8'"),
    ):
        with pytest.raises(InputError, match=message):
            PathTrainingOptions(**change)
    with pytest.raises(InputError, match="a prompt of -1 tokens"):
        offline_path_bins(trained[0], learnable(sequences=1), prompt=-1)
    with pytest.raises(InputError, match=r"\(3, 8, 2\) is not for a trace of \(4, 8, 2\)"):
        offline_path_bins(trained[0], learnable(sequences=1, layers=4))
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(InputError, match="training needs optax"):
        train_path(SPEC, PathExamples([learnable()]), OPTIONS)


def test_stretches_cover_every_token_once() -> None:
    examples = PathExamples([learnable(sequences=3, length=30), learnable(sequences=2, length=7)])
    for random in (None, np.random.default_rng(0)):
        stretches = examples.stretches([0, 2, 3], most=12, prompt=5, random=random)
        covered = sorted((part.trace, row) for part in stretches for row in range(part.begin, part.end))
        assert covered == [(0, row) for row in (*range(30), *range(60, 90))] + [(1, row) for row in range(7)]
        assert all(part.begin - 5 <= part.before <= part.begin < part.end <= part.begin + 12 for part in stretches)
    batches = list(examples.batches(stretches, rows=4, most=12, prompt=5))
    assert sum(int(batch.counted.sum()) for batch in batches) == 67
    first, batch = stretches[1], batches[0]
    trace = learnable(sequences=3, length=30) if first.trace == 0 else learnable(sequences=2, length=7)
    length, told = first.end - first.begin, first.begin - first.before
    np.testing.assert_array_equal(batch.tokens[1, :length], trace.tokens[first.begin : first.end])
    np.testing.assert_array_equal(batch.prompts[1, :told], trace.tokens[first.before : first.begin])
    np.testing.assert_array_equal(batch.experts[1, :length], trace.experts[first.begin : first.end])
    assert (batch.lengths[1], batch.counted[1].sum()) == (told, length)
