import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ef_jax
from ef_jax.cli import main
from ef_jax.replay.trace import DECODE, PROMPT, RoutingTrace

SHORT = ["--max-new-tokens", "6", "--ignore-eos", "--context", "64", "--chunk", "16", "--expert-fraction", "0.25"]
PROMPTS = ["ROMEO:", "oak, oak tree (noun):"]


def run(*words: str) -> dict[str, Any]:
    """The line of JSON of a run that goes well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["trace", *words, "--json"]) == 0
    assert out.getvalue().count("\n") == 1
    return json.loads(out.getvalue(), parse_constant=pytest.fail)


def error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run leaves on stderr."""
    capsys.readouterr()
    assert main(["trace", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An npz without any metadata."""
    path = tmp_path / "plain.npz"
    experts = np.arange(4)[None, None] + np.zeros((5, 3, 1), np.int64)
    np.savez(path, experts=experts, tokens=np.arange(5), offsets=np.array([0, 2, 5]), num_experts=8)
    return path


def test_a_run_is_recorded(small_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.npz"
    report = run(str(small_moe), *PROMPTS, "-o", str(file), *SHORT, "--weights", "--pregate", "2")
    trace = RoutingTrace.load(file)
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16, batch=2)
    prompts = [lm.encode(prompt).tolist() for prompt in PROMPTS]
    outputs = lm.generate(PROMPTS, max_new_tokens=6, ignore_eos=True)
    expected = [prompt + output.tokens[:-1] for prompt, output in zip(prompts, outputs, strict=True)]
    assert [trace.select(q, q + 1).tokens.tolist() for q in range(2)] == expected
    assert trace.phases.tolist() == [phase for p in prompts for phase in [PROMPT] * len(p) + [DECODE] * 5]
    assert trace.weights is not None
    assert (report["trace"], report["model"]) == (str(file), "small_moe")
    assert (report["sequences"], report["tokens"]) == (2, sum(map(len, expected)))
    assert report["prompt_tokens"] == sum(map(len, prompts))
    assert (report["moe_layers"], report["experts_per_layer"], report["experts_per_token"]) == (8, 32, 4)
    assert (report["weights"], report["pregate"]) == (True, 2)
    assert trace.pregate is not None
    assert trace.pregate.shape == (trace.count, 8, 2, 32)
    assert report["stored_bytes"] == file.stat().st_size
    assert report["stats"]["prefill"]["tokens"] == report["prompt_tokens"]
    assert "t.npz' exists: remove it or choose another name" in error(["-", "x", "-o", str(file)], capsys)


def test_the_bundled_model_and_a_line_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.npz"
    words = ["-", "--token-ids", "1,2,3", "--token-ids", "4", "-o", str(file), *SHORT, "--verbose"]
    assert main(["trace", *words]) == 0
    captured = capsys.readouterr()
    size = f"{file.stat().st_size / 1000:.3g} kB"
    assert captured.out == (
        f"{file}: 2 sequences, 14 tokens (4 of prompts), 8 layers of 32 experts, 4 a token, {size}\n"
    )
    assert captured.err.startswith("memory plan:")
    assert "decode" in captured.err


def test_a_plain_npz_is_imported(plain: Path, tmp_path: Path) -> None:
    report = run("--import", str(plain), "--model", "some model", "-o", str(tmp_path / "t.npz"))
    assert (report["model"], report["tokens"], report["sequences"]) == ("some model", 5, 2)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as file:
        assert str(file["format"]) == "ef_jax routing trace"
        assert int(file["version"]) == 1
        assert file["experts"].dtype == np.uint8
    again = run("--import", str(tmp_path / "t.npz"), "-o", str(tmp_path / "u.npz"))
    assert again["model"] == "some model"


def test_bad_input_is_one_line(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ef_jax, "load", lambda *args, **settings: pytest.fail("bad input is told before loading"))
    out = ["-o", str(tmp_path / "t.npz")]
    for words, message in (
        (out, "the following arguments are required: MODEL"),
        (["-", "x"], "the following arguments are required: -o/--output"),
        (["-", *out], "there is no prompt"),
        (["", "x", *out], "the model's path is empty"),
        (["/nowhere/at/all", "x", *out], "there is no directory '/nowhere/at/all'"),
        (["-", "x", "-o", str(tmp_path / "no" / "t.npz")], "there is no directory"),
        (["-", "x", "-o", str(tmp_path)], "is a directory: give the name of a file"),
        (["-", "x", "-o", ""], "is a directory: give the name of a file"),
        (["-", "x", "--model", "y", *out], "unrecognized arguments: --model"),
        (["-", "x", "--pregate", "9", *out], "pre-gate scores 9 layers ahead: give 1 to 8"),
        (["-", "x", "--pregate", "-1", *out], "argument --pregate: expected a whole number from 0"),
        (["--import", str(plain)], "the following arguments are required: -o/--output"),
        (["--import", str(plain), "x", *out], "unrecognized arguments: x"),
        (["--import", str(plain), "--weights", *out], "unrecognized arguments: --weights"),
        (["--import", "/nowhere/at/all", *out], "it cannot be read: No such file or directory"),
        (["--import", __file__, *out], "it is not an npz file"),
    ):
        assert message in error(words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.npz"]
