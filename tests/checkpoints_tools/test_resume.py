"""Conversions that stop half-way: what is finished stays, what is not is done again, nothing looks complete."""

import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import checkpoints_tools.to_orbax
from checkpoints_tools.cli import main
from checkpoints_tools.destination import locked
from ef_jax.errors import CheckpointError
from ef_jax.weights import open_checkpoint
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen3_moe"] | {"num_hidden_layers": 4}

# Kills itself the hard way while it saves the layer named on its command line.
_KILLED = """
import os, signal, sys
import checkpoints_tools.to_orbax as to_orbax
from checkpoints_tools.cli import main
save = to_orbax._save
def save_then_die(path, tree):
    if path.name == sys.argv[3]:
        (path.parent / (path.name + ".orbax-checkpoint-tmp")).mkdir(parents=True)
        (path / "state").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, tree)
to_orbax._save = save_then_die
main(sys.argv[1:3])
"""

_LIMITED = """
import resource, sys
from checkpoints_tools.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "original", CONFIG, random_tensors(CONFIG), 2)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "converted"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ef-convert: ")
    assert captured.err.count("\n") == 1
    return captured.err


def stop_at(layer: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoints_tools.to_orbax._save

    def save_or_fail(path: Path, tree: dict[str, np.ndarray]) -> None:
        if path.name == layer:
            raise error
        save(path, tree)

    monkeypatch.setattr(checkpoints_tools.to_orbax, "_save", save_or_fail)


def committed(destination: Path) -> list[str]:
    return list(json.loads((destination / "manifest.json").read_text())["layers"])


@pytest.mark.parametrize(("stop", "finished"), [("dense", []), ("00002", ["1"])])
def test_killed_and_resumed(
    original: Path, destination: Path, tmp_path: Path, stop: str, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _KILLED, str(original), str(destination), stop]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert committed(destination) == finished
    with pytest.raises(CheckpointError, match="is an unfinished conversion"):
        open_checkpoint(destination)

    saved = []
    save = checkpoints_tools.to_orbax._save
    monkeypatch.setattr(
        checkpoints_tools.to_orbax, "_save", lambda path, tree: (saved.append(path.name), save(path, tree))
    )
    assert main([str(original), str(destination), "--verify"]) == 0
    assert saved == {"dense": ["dense", "00001", "00002", "00003"], "00002": ["00002", "00003"]}[stop]
    assert sorted(path.name for path in destination.iterdir()) == ["dense", "layers", "manifest.json", "source"]
    assert sorted(path.name for path in (destination / "layers").iterdir()) == ["00001", "00002", "00003"]
    assert main([str(destination), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    for path in original.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_interrupted_by_the_user(
    original: Path, destination: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at("00002", KeyboardInterrupt(), patch)
        assert main([str(original), str(destination)]) == 130
    assert "run the same command again" in error_line(capsys)
    assert main([str(original), str(destination)]) == 0
    open_checkpoint(destination).close()


def test_resuming_with_another_source_or_dtype_is_refused(
    original: Path,
    destination: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        stop_at("00002", KeyboardInterrupt(), patch)
        main([str(original), str(destination)])
    capsys.readouterr()
    other = write_checkpoint(tmp_path / "other", CONFIG, random_tensors(CONFIG, seed=1), 2)
    for words in ([str(other), str(destination)], [str(original), str(destination), "--dtype", "float32"]):
        assert main(words) == 2
        assert "unfinished conversion of another source or to another dtype" in error_line(capsys)
    moved = original.rename(tmp_path / "moved")
    assert main([str(moved), str(destination)]) == 0


def test_two_conversions_at_once(original: Path, destination: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination.mkdir()
    with locked(destination), pytest.raises(Exception, match="another conversion is writing"), locked(destination):
        pass


@pytest.mark.parametrize(("layer", "stays"), [("dense", False), ("00001", False), ("00003", True)])
def test_a_disk_that_fills_up(
    original: Path,
    destination: Path,
    layer: str,
    stays: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As TensorStore words it, and wrapped as Orbax wraps it.
    full = ValueError("RESOURCE_EXHAUSTED: Error writing [No space left on device]")
    with monkeypatch.context() as patch:
        stop_at(layer, ExceptionGroup("saving", [full]), patch)
        assert main([str(original), str(destination)]) == 2
    line = error_line(capsys)
    assert "No space left on device" in line
    assert destination.exists() == ("make room and run the same command again" in line) == stays
    assert main([str(original), str(destination)]) == 0


def test_a_file_size_limit(original: Path, destination: Path) -> None:
    """A real refusal of the operating system, in the middle of Orbax."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # The manifest and the headers fit, the embedding does not.
    config = CONFIG | {"vocab_size": 8192}
    shutil.rmtree(original)
    write_checkpoint(original, config, random_tensors(config))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(original), str(destination)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr
    assert os.listdir(destination.parent) == ["original"]


@pytest.mark.parametrize("awaited", [False, True])
def test_a_second_array_that_cannot_be_written_is_not_logged(awaited: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax closes its event loop at the first failure, whatever else has failed by then."""

    async def write() -> None:
        raise OSError("File too large")

    def fail_and_close() -> None:
        loop = asyncio.new_event_loop()
        if awaited:
            task = loop.create_task(write())
            loop.call_soon(loop.stop)
            loop.run_forever()
            assert task.done()
        else:
            loop.create_future().set_exception(OSError("File too large"))
        loop.close()

    fail_and_close()
    gc.collect()
    assert "exception was never retrieved" in caplog.text
    caplog.clear()
    with checkpoints_tools.to_orbax._quiet_orbax():
        fail_and_close()
        gc.collect()
    assert caplog.text == ""


def test_weights_that_are_nan_leave_nothing(
    original: Path, destination: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.layers.3.mlp.experts.1.up_proj.weight"][3, 3] = np.nan
    shutil.rmtree(original)
    write_checkpoint(original, CONFIG, tensors)
    assert main([str(original), str(destination)]) == 2
    assert "layer 3 expert 1" in error_line(capsys)
    assert os.listdir(destination.parent) == ["original"]
