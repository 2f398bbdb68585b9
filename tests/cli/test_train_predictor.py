"""`ef-jax train-predictor`: trains, saves what can be loaded, and tells bad input in one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ef_jax.cli import main
from ef_jax.errors import InputError
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.predictor_file import load_predictor, load_routing_path
from ef_jax.replay.trace import RoutingTrace
from ef_jax.weights import open_checkpoint
from tests.predict.learnable import learnable


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """Of the bundled model's sizes."""
    return learnable(sequences=10, length=50, layers=8, experts=32, top_k=4)


def error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train-predictor", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_predictor_is_trained_and_saved(
    trace: RoutingTrace, small_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.save(tmp_path / "t.npz")
    words = ["-", str(tmp_path / "t.npz"), "-o", str(tmp_path / "P"), "--steps", "3", "--width", "4"]
    assert main(["train-predictor", *words, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["model"], report["tokens"]) == (3, "small_moe", 450)
    assert len(report["recall_before"]) == len(report["recall_after"]) == 2
    with open_checkpoint(small_moe) as checkpoint:
        fingerprint = model_fingerprint(checkpoint.spec, checkpoint.dense())
        correction, manifest = load_predictor(tmp_path / "P", checkpoint.spec, fingerprint)
    assert correction.spec.width == 4
    assert manifest.training["recall_after"] == report["recall_after"]
    assert "P' exists: choose another name, or overwrite it with --overwrite" in error(words, capsys)
    assert main(["train-predictor", *words, "--overwrite"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["1", "2"]
    assert [line.split()[0] for line in lines[1:3]] == ["pre-gate", "corrected"]
    assert "trained on 450 tokens in 3 steps" in lines[3]


def test_a_routing_path_needs_no_scores(
    trace: RoutingTrace, small_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataclasses.replace(trace, pregate=None).save(tmp_path / "t.npz")
    words = ["-", str(tmp_path / "t.npz"), "-o", str(tmp_path / "P"), "--kind", "routing_path", "--width", "4"]
    assert main(["train-predictor", *words, "--steps", "2", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["steps"], report["width"]) == ("routing_path", 2, 4)
    assert len(report["recall"]) == 8
    with open_checkpoint(small_moe) as checkpoint:
        fingerprint = model_fingerprint(checkpoint.spec, checkpoint.dense())
        path, manifest = load_routing_path(tmp_path / "P", checkpoint.spec, fingerprint)
        with pytest.raises(InputError, match="is a routing path, and here a correction of pre-gate scores is asked"):
            load_predictor(tmp_path / "P", checkpoint.spec, fingerprint)
    assert (path.spec.d_model, path.spec.d_ff) == (4, 16)
    assert manifest.training["loss"] == report["loss"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["P", "t.npz"]
    assert "there is no checkpoint" in error([*words, "--overwrite", "--resume"], capsys)


def test_bad_input_is_one_line(trace: RoutingTrace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.pregate is not None
    variants = {
        "plain": {"pregate": None},
        "layers": {"experts": trace.experts[:, :7], "pregate": trace.pregate[:, :7, :1]},
        "tokens": {"tokens": trace.tokens + np.int32(4090)},
        "routers": {"fingerprint": "0" * 32},
        "good": {},
    }
    files = {name: str(tmp_path / f"{name}.npz") for name in variants}
    for name, change in variants.items():
        dataclasses.replace(trace, **change).save(files[name])
    trace.select(0, 2).save(tmp_path / "few.npz")
    out = ["-o", str(tmp_path / "P")]
    for words, message in (
        (["-", *out], "the following arguments are required: TRACE"),
        (["-", files["good"]], "the following arguments are required: -o/--output"),
        (["-", files["plain"], *out], "has no pre-gate scores: record it with ef-jax trace --pregate 6"),
        (["-", files["layers"], *out], "is of another model: it has 7 MoE layers, MODEL has 8"),
        (["-", files["tokens"], *out], "is of another model: it has token"),
        (["-", files["routers"], *out], "was recorded from a model with other routers"),
        (["-", str(tmp_path / "few.npz"), *out], "tokens to learn from are too few"),
        (["-", "/nowhere", *out], "it cannot be read"),
        (["/nowhere/at/all", files["good"], *out], "there is no directory '/nowhere/at/all'"),
        (["-", files["good"], "-o", str(tmp_path / "no" / "P")], "there is no directory"),
        (["-", files["good"], *out, "--steps", "0"], "expected a whole number from 1"),
        (["-", files["good"], *out, "--epochs", "-1"], "expected a number above 0"),
        (["-", files["good"], *out, "--resume"], "--resume is for --kind routing_path"),
        (["-", files["good"], *out, "--kind", "routing_path", "--width", "6"], "--width must be a multiple of 4"),
        (["-", files["good"], *out, "--kind", "else"], "invalid choice: 'else'"),
        (["-", files["good"], *out, "--epochs", "1", "--steps", "1"], "not allowed with argument"),
    ):
        assert message in error(words, capsys)
    assert not (tmp_path / "P").exists()
