import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ef_jax.errors import CheckpointError
from ef_jax.weights.safetensors import SafetensorsFile, parse_header

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.0, np.float32),
}
VALID = save(ARRAYS, metadata={"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_official_library_wrote(path: Path) -> None:
    path.write_bytes(VALID)
    file = SafetensorsFile(path)
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        out = np.empty_like(array)
        file.read(name, out)
        np.testing.assert_array_equal(out, array)
    row = np.empty(3, np.float32)
    file.read("a", row, offset=12)
    np.testing.assert_array_equal(row, ARRAYS["a"][1])
    with pytest.raises(ValueError, match="which has 24"):
        file.read("a", row, offset=16)
    file.close()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "malformed"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "malformed"),
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
        ({"a": 3}, "exactly dtype, shape and data_offsets"),
        ({"a": tensor() | {"code": "x"}}, "exactly dtype, shape and data_offsets"),
        ({"a": tensor(dtype="F31")}, "unknown dtype 'F31'"),
        ({"a": tensor(shape=[-2])}, "not a list of sizes"),
        ({"a": tensor(shape=[True, 2])}, "not a list of sizes"),
        ({"a": tensor(shape=[2.0])}, "not a list of sizes"),
        ({"a": tensor(shape=[10**30])}, "not a list of sizes"),
        ({"a": tensor(shape=[2**40, 2**40])}, "cannot take 8 bytes"),
        ({"a": tensor(offsets=[8, 0])}, "not \\[begin, end\\]"),
        ({"a": tensor(offsets=[0, 12])}, "cannot take 12 bytes"),
        ({"a": tensor(offsets=[4, 12])}, "starts at byte 4, expected 0"),
        ({"a": tensor(), "b": tensor()}, "starts at byte 0, expected 8"),
    ],
)
def test_a_header_that_breaks_the_format(path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(write(path, header, b"\0" * 8))


@pytest.mark.parametrize("size", [0, 7, 8, HEADER_END - 1, HEADER_END, len(VALID) - 1])
def test_a_truncated_file(path: Path, size: int) -> None:
    path.write_bytes(VALID[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsFile(path)


def test_bytes_after_the_end(path: Path) -> None:
    path.write_bytes(VALID + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        SafetensorsFile(path)


def test_an_absurd_header_length(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsFile(path)


def test_what_is_not_a_file(path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_open(path: Path) -> None:
    path.write_bytes(VALID)
    file = SafetensorsFile(path)
    os.truncate(path, HEADER_END)
    with pytest.raises(CheckpointError, match="truncated"):
        file.read("a", np.empty((2, 3), np.float32))
    file.close()


@given(st.data())
def test_a_mutated_file_reads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, HEADER_END - 1))
        mutated[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(mutated)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert sum(entry.nbytes for entry in file.tensors.values()) == file.data_bytes < len(mutated)
    for name, entry in file.tensors.items():
        file.read(name, np.empty(entry.nbytes, np.uint8))
    file.close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), json_values)
def test_any_json_in_any_field_reads_or_is_refused(field: str, value: object) -> None:
    header = {"a": tensor(), "b": tensor(offsets=(8, 16))}
    if field == "a":
        header["a"] = value
    else:
        header["a"][field] = value
    try:
        entries = parse_header(json.dumps(header).encode(), "x")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(entry.start + entry.nbytes <= 16 for entry in entries.values())
