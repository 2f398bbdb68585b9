"""`bench.recall` runs on a made-up recording, and its last line is what it says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import _forest, recall
from bench._recall_data import RecallData
from tests.predict.learnable import learnable


def made_up_recording(vocab: int) -> RecallData:
    sizes: dict[str, Any] = {"layers": 6, "experts": 8, "top_k": 2, "distances": 6, "vocab": vocab}
    second = learnable(sequences=4, length=40, seed=3, **sizes)
    return RecallData(
        spec=type("Spec", (), {"vocab": vocab})(),
        sampled=learnable(sequences=10, length=60, seed=1, **sizes),
        first_halves=learnable(sequences=4, length=40, seed=2, **sizes),
        second_halves=second,
        texts=["one", "one", "other", "other"],
        shifts=np.zeros((7, 6, 8), np.float32),
    )


def test_every_part_on_a_made_up_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = made_up_recording(16)
    monkeypatch.setattr(recall, "record", lambda samples, seed: data)
    monkeypatch.setattr(recall, "_WITHOUT", {"no token id": ("token",)})
    monkeypatch.setattr(recall, "_CALLS", 2)
    monkeypatch.setattr(_forest, "installed", lambda: False)
    small = recall.CorrectionSpec(layers=2, experts=4, top_k=2, distances=2, vocab=8, width=4)
    monkeypatch.setattr(recall, "_LARGE", small)
    saved, picture = tmp_path / "recall.json", tmp_path / "recall.png"
    words = ["--width", "16", "--epochs", "20", "--ablation-epochs", "1", "--save", str(saved), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["recall", *words])
    assert recall.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(saved.read_text())
    assert picture.read_bytes()[1:4] == b"PNG"
    assert "forest: scikit-learn is not installed, so it is left out" in lines
    quality = result["quality"]
    assert quality["recall"]["corrected"][0] > quality["recall"]["pre-gate"][0] + 20
    assert quality["recall"]["pre-gate with shift"] == quality["recall"]["pre-gate"]
    assert quality["by_source"]["corrected"][4][2:] == [None] * 4
    assert set(quality["by_text"]) == {"one", "other"}
    assert set(result["ablation"]["recall"]) == {"all inputs", "no token id"}
    assert result["forest"] is None
    assert [row["sizes"] for row in result["cost"]] == ["bundled", "bundled", "48 x 128, top-8", "48 x 128, top-8"]
