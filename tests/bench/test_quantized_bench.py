"""The bench of rounded experts: its shares and its line of JSON."""

import json
import sys
from pathlib import Path

import pytest

from bench import quantized
from ef_jax.errors import InputError

SHAPE = "D=64,F=32,E=8,K=2,L=1,V=64"


def test_a_made_up_model_moves_its_share_of_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantized", "--shape", SHAPE, "--tokens", "5", "--repeats", "1", "--link", "1GB/s"]
    monkeypatch.setattr(sys, "argv", [*words, "--formats", "int4", "--scratch", str(tmp_path)])
    monkeypatch.setattr(quantized, "_WARM_TOKENS", 2)
    assert quantized.main() == 0
    plain, int4 = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (plain["format"], int4["format"]) == (None, "int4")
    assert int4["block_bytes"] == 3 * 64 * 32 // 2 + 3 * 64 * 32 // 32 * 2
    assert int4["block_share"] == pytest.approx(int4["block_bytes"] / plain["block_bytes"], rel=1e-5)
    assert 0 < int4["bytes_share"] < 0.5
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["quantized", "--shape", SHAPE, "--scratch", str(tmp_path)])
    with pytest.raises(InputError, match=r"int4\+gptq"):
        quantized.main()
