import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_jax
from ef_jax.cli import generate, main, options
from ef_jax.cli.sampling_options import from_generation_config
from ef_jax.errors import InputError
from ef_jax.schedule.device_link import CopyMode
from ef_jax.weights.dtypes import DtypeName

_ROOT = Path(__file__).parent.parent.parent
NEVER_LOADED = "this is where the model would be loaded"


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is told before anything is loaded."""
    monkeypatch.setattr(ef_jax, "load", _never_load)


def _never_load(*args: Any, **settings: Any) -> NoReturn:
    raise InputError(NEVER_LOADED)


def stderr_of(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command leaves on stderr."""
    capsys.readouterr()
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ef-jax: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "'fly' is not a command: choose generate, plan, info"),
        (["--fly"], "unrecognized arguments: --fly (see ef-jax --help)"),
        (["generate"], "there is no prompt"),
        (["generate", ""], "a prompt is empty"),
        (["generate", "-", "-"], "give - once"),
        (["generate", "x", "--fly"], "unrecognized arguments: --fly (see ef-jax generate --help)"),
        (["generate", "x", "--max-new"], "unrecognized arguments: --max-new"),
        (["generate", "x", "--temperature"], "expected one argument"),
        (["generate", "x", "--temperature", "nan"], "--temperature: expected a number, got 'nan'"),
        (["generate", "x", "--temperature", "1e999"], "--temperature: expected a number, got '1e999'"),
        (["generate", "x", "--temperature", "-1"], "temperature must be a number from"),
        (["generate", "x", "--top-p", "0"], "top_p must be a number from"),
        (["generate", "x", "--top-p", "1.5"], "top_p must be a number from"),
        (["generate", "x", "--top-k", "-3"], "--top-k: expected a whole number from 0"),
        (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty must be a number from"),
        (["generate", "x", "--seed", "1.5"], "--seed: expected a whole number from 0 to 2147483647, got '1.5'"),
        (["generate", "x", "--stop", ""], "a stop string is empty"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens: expected a whole number from 1"),
        (["generate", "x", "--max-new-tokens", "9" * 5000], "--max-new-tokens: expected a whole number from 1"),
        (["generate", "x", "--max-new-tokens", ""], "--max-new-tokens: expected a whole number from 1"),
        (["generate", "x", "--batch", "0"], "--batch: expected a whole number from 1"),
        (["generate", "x", "--context", "0"], "--context: expected a whole number from 2"),
        (["generate", "x", "--chunk", "-1"], "--chunk: expected a whole number from 1"),
        (["generate", "x", "--expert-fraction", "1.1"], "expected a number from 0 to 1, got '1.1'"),
        (["generate", "x", "--expert-fraction", "nan"], "--expert-fraction: expected a number"),
        (["generate", "x", "--device-memory", "8 GiB, or so"], "'8 GiB, or so' is not a size in bytes"),
        (["generate", "x", "--device-memory", "-8GiB"], "--device-memory"),
        (["generate", "x", "--device-memory", "0"], "'0' is not a size in bytes"),
        (["generate", "x", "--device-memory", "1GB", "--expert-fraction", "1"], "not allowed with argument"),
        (["generate", "x", "--quiet", "--verbose"], "not allowed with argument"),
        (["generate", "x", "--policy", "fifo"], "invalid choice: 'fifo'"),
        (["generate", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "x", "--copy-mode", "slow"], "invalid choice: 'slow'"),
        (["generate", "--token-ids", "1,,2"], "--token-ids takes numbers such as 1,2,3, got '1,,2'"),
        (["generate", "--token-ids", "-1"], "--token-ids"),
        (["generate", "--token-ids", ""], "--token-ids takes numbers"),
        (["generate", "--token-ids", "9" * 12], "--token-ids takes numbers"),
        (["generate", "x", "--system", "y"], "add --chat"),
        (["generate", "x", "--chat"], "has no chat template"),
        (["generate", "x", "--chat", "--token-ids", "1"], "give no --token-ids with it"),
        (["generate", "--prompt-file", "/nowhere/at/all"], "cannot read the prompt file '/nowhere/at/all'"),
        (["generate", "--prompt-file", "/"], "cannot read the prompt file '/'"),
        (["generate", "x", "--model", ""], "the model's path is empty"),
        (["generate", "x", "--model", "/nowhere/at/all"], "there is no directory '/nowhere/at/all'"),
        (["generate", "x", "--model", "y" * 5000], "cannot open"),
        (["plan", "/nowhere/at/all"], "there is no directory '/nowhere/at/all'"),
        (["plan", "a", "b"], "unrecognized arguments: b (see ef-jax plan --help)"),
        (["plan", "--batch", "9999"], "batch must be between 1 and 1024, got 9999"),
        (["plan", "--context", "1025"], "context 1025 is longer than the model's 1024 positions"),
        (["info", "/nowhere/at/all"], "there is no directory '/nowhere/at/all'"),
        (["info", "y" * 5000], "cannot open"),
        (["info", ""], "the model's path is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = stderr_of(words, capsys)
    assert message in line
    assert NEVER_LOADED not in line
    assert len(line) < 800


def test_prompts_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"abc\xff\xfe")
    assert "is not UTF-8 text" in stderr_of(["generate", "--prompt-file", str(tmp_path / "bytes")], capsys)
    (tmp_path / "empty").write_bytes(b"\n")
    assert "a prompt is empty" in stderr_of(["generate", "--prompt-file", str(tmp_path / "empty")], capsys)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\x80")))
    assert "stdin is not UTF-8 text" in stderr_of(["generate", "-"], capsys)


def test_a_directory_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["plan"], ["info"], ["generate", "x", "--model"]):
        assert "it is not a checkpoint" in stderr_of([*command, str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for command in (["plan"], ["info"]):
        assert "gpt2" in stderr_of([*command, str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in stderr_of(["plan", str(tmp_path)], capsys)


def test_a_traceback_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "/nowhere/at/all", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory: give a smaller --device-memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 5 bytes"), 1, "out of memory"),
        (RuntimeError("boom\nboom"), 1, "defect: RuntimeError: boom boom (--debug shows where)"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_is_no_bad_input(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **settings: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(ef_jax, "load", load)
    assert message in stderr_of(["generate", "x"], capsys, code)


def test_a_reader_that_goes_away_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **settings: Any) -> NoReturn:
        raise BrokenPipeError

    monkeypatch.setattr(ef_jax, "load", load)
    assert main(["generate", "x"]) == 141
    assert capsys.readouterr().err == ""


def test_choices_are_those_of_the_library() -> None:
    assert set(options.COPY_MODES) == set(get_args(CopyMode))
    assert set(options.DTYPES) == set(get_args(DtypeName))


def test_generation_configs() -> None:
    assert from_generation_config({}) == {}
    assert from_generation_config({"temperature": 0.6, "top_p": 0.9}) == {}
    assert from_generation_config({"do_sample": True, "top_k": 20, "top_p": None}) == {"temperature": 1.0, "top_k": 20}
    assert from_generation_config({"min_p": None, "num_beams": 1, "repetition_penalty": 1.1}) == {
        "repetition_penalty": 1.1
    }
    with pytest.raises(InputError, match=r"sets min_p=0\.1, which is not implemented"):
        from_generation_config({"do_sample": True, "min_p": 0.1})


_NAMES = set(re.findall(r"--[a-z-]+", generate.build_parser().format_usage())) - {"--debug"}
_OPTIONS = [*sorted(_NAMES), "--no-such-option", "--"]
_VALUES = st.one_of(
    st.sampled_from(["", "-1", "0", "1", "0.5", "nan", "inf", "-inf", "1e999", "9" * 400, "8GiB", "1,2", "\udc80"]),
    st.text(max_size=8).filter(lambda text: not text.startswith(("-h", "--h"))),
)


@settings(max_examples=80)
@given(words=st.lists(st.one_of(st.sampled_from(_OPTIONS), _VALUES), max_size=7))
def test_any_arguments_end_in_one_line_or_at_the_loader(words: list[str]) -> None:
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", err)
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
        patch.setattr(ef_jax, "load", _never_load)
        assert main(["generate", *words]) == 2, err.getvalue()
    assert err.getvalue().count("\n") == 1
    assert err.getvalue().startswith("ef-jax: error: ")


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "ef_jax", "generate", "x", "--top-p", "2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=_ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ef-jax: error: top_p must be")
