"""`bench.lossy` measures what can run, names what cannot, and draws it."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest

from bench import lossy
from bench.make_synthetic import Synthetic, write_synthetic
from ef_jax.loading import load


def test_a_row_for_each_strength_and_a_reason_for_each_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved, picture = tmp_path / "model", tmp_path / "lossy.json", tmp_path / "lossy.png"
    write_synthetic(model, Synthetic(hidden=32, width=16, experts=16, top_k=4, layers=2, vocab=64))
    monkeypatch.setattr(lossy, "load", functools.partial(load, model))
    monkeypatch.setattr(lossy, "STRENGTHS", {"lossy_adaptive_experts": (0.01,), "lossy_quantize": ("int4",)})
    words = ["--tokens", "12", "--link", "1GB/s", "--save", str(saved), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["lossy", *words])
    assert lossy.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads(saved.read_text())
    assert picture.read_bytes()[1:4] == b"PNG"

    lossless, resident, adaptive = result["rows"]
    assert lossless["lossy"] is None
    assert lossless["cost_nats"] == resident["cost_nats"] == 0
    assert lossless["nats"] == pytest.approx(math.log(64), rel=0.2)
    assert lossless["experts_per_layer"] == resident["experts_per_layer"] == 4
    assert resident["bytes_per_token"] == resident["absent_per_token"] == 0
    assert adaptive["lossy"] == {"lossy_adaptive_experts": 0.01}
    assert adaptive["experts_per_layer"] == 1
    assert 0 < adaptive["bytes_per_token"] < lossless["bytes_per_token"]
    assert [(row["option"], row["strength"]) for row in result["refused"]] == [("lossy_quantize", "int4")]
    assert any(line.startswith("lossy_quantize int4 cannot run: ") for line in lines)
