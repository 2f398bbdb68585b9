"""The bench of computing in place, at its smallest: every way decodes, and the figures fit together."""

import json
import sys
from pathlib import Path

import pytest

from bench import compute_in_place


def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compute_in_place, "RATES", {"PCIe 4": "25GB/s"})
    words = ["--only", "here", "--shapes", "tiny", "--batches", "2", "--steps", "3", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["compute_in_place", *words, "--scratch", str(tmp_path)])
    monkeypatch.setattr(compute_in_place, "dispatch_inline", lambda: None)
    assert compute_in_place.main() == 0
    (point,) = json.loads(capsys.readouterr().out.splitlines()[-1])["here"]
    assert point["batch"] == 2
    assert all(point["tokens_per_second"][way]["median"] > 0 for way in compute_in_place.WAYS)
    assert point["bytes_per_token"]["fetch"] > 0
    assert 0 <= point["computed"] <= 1
    assert point["miss"]["choice"] == "auto"
