import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import checkpoints_tools.cli
from checkpoints_tools.cli import main
from ef_jax import console
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen2_moe"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an original and its conversion."""
    base = tmp_path_factory.mktemp("base")
    write_checkpoint(base / "original", CONFIG, random_tensors(CONFIG), 2)
    assert main([str(base / "original"), str(base / "converted")]) == 0
    return base


def fails(words: list[object], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ef-convert: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_json_is_the_last_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(base / "original"), str(tmp_path / "new"), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["verified"] is True
    assert result["experts"] == 8
    assert result["format"] == "converted"
    assert main([str(tmp_path / "new"), str(tmp_path / "back"), "--to", "huggingface", "--verify", "--json"]) == 0
    back = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert back["format"] == "huggingface"
    assert back["bytes"] == result["bytes"]


@pytest.mark.parametrize("name", ["original", "converted"])
def test_inspect(base: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(base / name), "--json", "--verify"]) == 0
    contents = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert contents["parameters"] * 2 == contents["bytes"] == contents["dense_bytes"] + contents["expert_bytes"]
    assert contents["active_parameters"] < contents["parameters"]
    assert contents["experts_stored"] == "per_expert"
    assert contents["tokenizer"] is True
    assert main(["inspect", str(base / name)]) == 0
    assert "family             qwen2_moe\n" in capsys.readouterr().out


def test_usage_errors_are_one_line(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails([], "the following arguments are required: SRC", capsys)
    fails(["inspect"], "the following arguments are required: PATH", capsys)
    fails([base / "original", base / "x", "--dtype", "int8"], "invalid choice: 'int8'", capsys)
    fails([base / "original", base / "x", "--to", "gguf"], "invalid choice: 'gguf'", capsys)
    fails([base / "original"], "a destination is missing", capsys)
    fails([base / "original", base / "x", "--to", "huggingface"], "it converts --to orbax", capsys)
    fails([base / "converted", base / "x"], "it converts --to huggingface", capsys)
    assert not (base / "x").exists()


@pytest.mark.parametrize("name", ["original", "converted"])
def test_destinations_that_cannot_be(base: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [base / name, "--to", "huggingface" if name == "converted" else "orbax"]
    for taken in (base / "converted", base / "original", tmp_path, base / "original" / "config.json"):
        fails([*words, taken], "exists: remove it or choose another", capsys)
    (tmp_path / "dangling").symlink_to("nowhere")
    fails([*words, tmp_path / "dangling"], "exists: remove it or choose another", capsys)
    fails([*words, tmp_path / "no" / "parent"], "there is no directory", capsys)
    fails([*words, base / "original" / "config.json" / "below"], "there is no directory", capsys)
    if os.path.isdir("/proc/self"):
        # Refuses writers even if they are root.
        fails([*words, "/proc/self/x"], "'/proc/self/x'", capsys)
    assert sorted(os.listdir(tmp_path)) == ["dangling"]


@pytest.mark.parametrize("name", ["original", "converted"])
def test_a_full_disk_is_seen_before_anything_is_written(
    base: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10_000, 10_000))
    to = "huggingface" if name == "converted" else "orbax"
    fails([base / name, tmp_path / "new", "--to", to], "GB are needed", capsys)
    assert os.listdir(tmp_path) == []


def test_writing_back_fails_half_way(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints_tools.to_huggingface._write_file", full)
    fails([base / "converted", tmp_path / "back", "--to", "huggingface"], "No space left on device", capsys)
    assert os.listdir(tmp_path) == []


def test_a_bad_source_creates_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(base / "original", tmp_path / "source")
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    fails([source, tmp_path / "new"], "is truncated", capsys)
    shard.unlink()
    fails([source, tmp_path / "new"], "lacks 'model-00002-of-00002.safetensors'", capsys)
    (source / "config.json").write_text("{")
    fails([source, tmp_path / "new"], "is not valid JSON", capsys)
    fails([tmp_path / "nowhere", tmp_path / "new"], "there is no directory", capsys)
    assert os.listdir(tmp_path) == ["source"]


def test_a_traceback_only_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_is_told_apart(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(checkpoints_tools.cli, "open_checkpoint", broken)
    assert main(["inspect", str(base / "original")]) == 1
    assert capsys.readouterr().err == "ef-convert: defect: RuntimeError: boom (--debug shows where)\n"


def test_an_interrupt_says_how_to_go_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints_tools.cli, "convert_to_orbax", interrupted)
    assert main([str(base / "original"), str(tmp_path / "new")]) == console.INTERRUPTED
    assert capsys.readouterr().err == "ef-convert: interrupted: run the same command again to go on\n"


def test_a_reader_that_leaves_early_is_not_reported(base: Path) -> None:
    words = [sys.executable, "-m", "checkpoints_tools.cli", "inspect", str(base / "original")]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == console.BROKEN_PIPE


def test_arguments_default_to_the_command_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ef-convert", "inspect", str(base / "original")])
    assert main() == 0
    assert "qwen2_moe" in capsys.readouterr().out
