"""`bench.routing_path` runs on made-up recordings; its baselines say what they should."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import _path_baselines, _routing_path_data, routing_path
from bench._recall_data import RecallData
from ef_jax.predict.path_metrics import candidates
from tests.predict.learnable import learnable

SIZES: dict[str, Any] = {"layers": 3, "experts": 8, "top_k": 2, "distances": 2}


def test_prediction_on_made_up_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = RecallData(
        spec=type("Spec", (), {"vocab": 16})(),  # type: ignore[arg-type]
        sampled=learnable(sequences=8, length=40, seed=1, **SIZES),
        first_halves=learnable(sequences=2, length=40, seed=2, **SIZES),
        second_halves=learnable(sequences=4, length=20, seed=3, **SIZES),
        texts=["one"] * 4,
        shifts=np.zeros((4, 2, 8), np.float32),
    )
    monkeypatch.setattr(_routing_path_data, "record", lambda samples, seed: data)
    learnable(sequences=14, length=40, **SIZES).save(tmp_path / "t.npz")
    saved = tmp_path / "out.json"
    words = ["--trace", str(tmp_path / "t.npz"), "--fit", "10", "--report", "4", "--epochs", "6", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["routing_path", *words, "--only", "prediction", "--save", str(saved)])
    assert routing_path.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    told = result["prediction"]
    for name, tokens in (("trace", 160), ("bundled", 80)):
        part = told[name]
        assert part["reported_tokens"] == tokens
        assert set(part["measured"]) == {"routing path", "token-id table", "previous token", "history"}
        assert set(part["measured"]["routing path"]) == {"1", "4"}
        table = part["measured"]["token-id table"]["1"][0]
        assert table["recall"] > 95
        assert len(table["recall_by_layer"]) == 3
        assert part["calibration_error_points"]["routing path"] > 0
    against = told["bundled"]["against_pregate"]
    assert against["pregate"][1][0] is None
    assert len(against["layers_where_better"]) == 2


def test_a_token_table_counts_and_backs_off() -> None:
    learned, asked = learnable(sequences=4), learnable(sequences=1, seed=7)
    assert candidates(_path_baselines.token_table([learned], asked), asked)[0].recall.min() == 1
    elsewhere = dataclasses.replace(asked, tokens=asked.tokens + 100)
    table = _path_baselines.token_table([learned], elsewhere)
    frequencies = _path_baselines.frequency([learned], asked)
    np.testing.assert_allclose(table, np.broadcast_to(frequencies, table.shape), rtol=1e-5)
    np.testing.assert_allclose(frequencies.sum(axis=1), 2, rtol=1e-5)


def test_the_previous_token_and_history_know_nothing_of_the_running_one() -> None:
    trace = learnable(sequences=2, length=30)
    before = _path_baselines.previous_token([trace], trace)
    history = _path_baselines.history([trace], trace)
    changed = trace.experts.copy()
    changed[40:] = (changed[40:] + 1) % 8
    other = dataclasses.replace(trace, experts=changed)
    np.testing.assert_array_equal(_path_baselines.previous_token([trace], other)[:41], before[:41])
    np.testing.assert_array_equal(_path_baselines.history([trace], other)[:41], history[:41])
    again = np.take_along_axis(before[1:30], trace.experts[:29].astype(int), axis=2).mean()
    assert again > before[1:30].mean() + 0.1
    np.testing.assert_array_equal(before[0], before[30])  # where a sequence begins
