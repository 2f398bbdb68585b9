"""Converted checkpoints that were changed behind our back are refused, in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools import convert_to_orbax, verify
from checkpoints_tools.cli import main
from ef_jax.errors import CheckpointError, InputError
from ef_jax.weights import open_checkpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["qwen3_moe"]
BLOCK = "layers/00001/state/00002"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("intact")
    original = write_checkpoint(base / "original", CONFIG, random_tensors(CONFIG))
    with open_checkpoint(original) as checkpoint:
        assert isinstance(checkpoint, HuggingFaceCheckpoint)
        convert_to_orbax(checkpoint, base / "converted")
    return base / "converted"


@pytest.fixture
def converted(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "converted")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_intact_verifies(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(converted), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] is True


@pytest.mark.parametrize(
    ("file", "at"),
    [
        (f"{BLOCK}/c/0/0/0", 0),
        (f"{BLOCK}/c/0/0/0", 3 * 8 * 16 * 2 - 1),
        (f"{BLOCK}/c/0/0/0", -20),
        (f"{BLOCK}/c/0/0/0", -1),
        ("dense/state/norm.weight/c/0", 5),
        ("dense/state/layers.0.mlp.block/c/0/0/0", 100),
        ("source/tokenizer.json", 3),
        ("source/safetensors_headers.json", 40),
    ],
)
def test_verify_finds_one_flipped_bit(converted: Path, file: str, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    flip(converted / file, at)
    assert main([str(converted), "--verify"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert main(["inspect", str(converted), "--verify"]) == 2


def truncate(path: Path) -> None:
    os.truncate(path / BLOCK / "c/0/0/0", 100)


def lengthen(path: Path) -> None:
    with open(path / BLOCK / "c/0/0/0", "ab") as file:
        file.write(b"x")


def remove_array(path: Path) -> None:
    shutil.rmtree(path / BLOCK)


def remove_chunk(path: Path) -> None:
    shutil.rmtree(path / BLOCK / "c")


def other_shape(path: Path) -> None:
    metadata = json.loads((path / BLOCK / "zarr.json").read_text())
    (path / BLOCK / "zarr.json").write_text(json.dumps(metadata | {"shape": [3, 16, 8]}))


def no_json(path: Path) -> None:
    (path / BLOCK / "zarr.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, lengthen, remove_array, remove_chunk, other_shape, no_json])
def test_a_damaged_block_is_refused(converted: Path, damage: Callable[[Path], None]) -> None:
    damage(converted)
    with open_checkpoint(converted) as checkpoint:
        block = np.empty(checkpoint.spec.block_shape, "bfloat16")
        with pytest.raises(CheckpointError, match=r"00002.*(bytes, expected|No such file|describe|not valid JSON)"):
            checkpoint.read_block(1, 2, block)
        checkpoint.read_block(1, 1, block)
        with pytest.raises(CheckpointError):
            verify(checkpoint)


def edit(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "other"}, "is not a manifest"),
        ({"version": 2}, "has version 2, this library reads 1"),
        ({"complete": False}, "is an unfinished conversion"),
        ({"complete": 1}, "is malformed"),
        ({"dtype": "int8"}, "is malformed"),
        ({"dtype": []}, "is malformed"),
        ({"layers": {}}, "name different experts"),
        ({"layers": {"1": [1, 2]}}, "name different experts"),
        ({"layers": {"x": [1]}}, "is malformed"),
        ({"dense": {}}, "name different arrays"),
        ({"dense": {"../../x": 1}}, "is malformed"),
        ({"nbytes": -1}, "is malformed"),
        ({"unknown": 1}, "is malformed"),
    ],
)
def test_a_manifest_that_lies(converted: Path, fields: dict[str, object], message: str) -> None:
    edit(converted, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(converted)
    assert "\n" not in str(caught.value)


@given(st.data())
def test_any_value_anywhere_in_the_manifest_is_read_or_refused(
    intact: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    manifest = json.loads((intact / "manifest.json").read_text())
    parent = manifest
    key = data.draw(st.sampled_from(sorted(manifest)))
    while isinstance(parent[key], dict) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    parent[key] = data.draw(leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves))
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    directory.mkdir(exist_ok=True)
    if not (directory / "source").exists():
        (directory / "source").symlink_to(intact / "source")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    try:
        open_checkpoint(directory).close()
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "disagree"),
        ({"../evil.safetensors": "{}"}, "not the header of a .safetensors file"),
        ({"config.json": "{}"}, "not the header of a .safetensors file"),
        ({"model.safetensors": 3}, "not the header of a .safetensors file"),
        ({"model.safetensors": "{"}, "malformed safetensors header"),
    ],
)
def test_headers_that_lie(
    converted: Path, headers: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (converted / "source" / "safetensors_headers.json").write_text(json.dumps(headers))
    assert main([str(converted), str(tmp_path / "back"), "--to", "huggingface"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted"]
