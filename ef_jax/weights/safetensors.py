"""Reads safetensors files straight into arrays that the caller owns.

The official reader memory-maps a file, so that every byte read counts as this process's memory, and returns arrays of
its own. This one reads ranges (`preadv`) into a packed expert block. Headers are validated as strictly as the format
is written down: known dtypes, sizes that agree, no gaps, no overlaps, no duplicate names.
"""

import collections
import dataclasses
import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.weights.dtypes import BITS_OF_CODE, as_bytes

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies: dtype code (such as "BF16"), shape, first byte in the data section, length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """One open safetensors file. Reads are thread-safe.

    Attributes:
      path: the file.
      header: the header's JSON text, exactly as stored.
      tensors: name -> entry, in the order of their bytes.
      data_bytes: length of the data section.

    Raises:
      CheckpointError: no such regular file, or it is truncated or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Opening a pipe would wait for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{str(path)!r} is not a regular file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {str(path)!r}: {error.strerror}") from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._fd).st_size
        prefix = np.empty(min(_LENGTH_BYTES, size), np.uint8)
        self._fill(prefix, 0)
        if size < _LENGTH_BYTES:
            raise CheckpointError(f"{str(self.path)!r} is truncated: {size} bytes, a safetensors file has at least 8")
        (length,) = struct.unpack("<Q", prefix.tobytes())
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{str(self.path)!r} is not a safetensors file: it claims a header of {length} bytes,"
                f" the format allows {MAX_HEADER_BYTES}"
            )
        if length > size - _LENGTH_BYTES:
            raise CheckpointError(
                f"{str(self.path)!r} is truncated: its header needs {length} bytes, {size - _LENGTH_BYTES} follow"
            )
        header = np.empty(length, np.uint8)
        self._fill(header, _LENGTH_BYTES)
        self.header = header.tobytes()
        self.tensors = parse_header(self.header, str(self.path))
        self.data_bytes = max((entry.start + entry.nbytes for entry in self.tensors.values()), default=0)
        self._data_start = _LENGTH_BYTES + length
        promised = self._data_start + self.data_bytes
        if size != promised:
            problem = "truncated" if size < promised else "damaged"
            raise CheckpointError(f"{str(self.path)!r} is {problem}: {size} bytes, its header promises {promised}")

    def read(self, name: str, out: np.ndarray, offset: int = 0) -> None:
        """Fill `out` (C-contiguous, any dtype) with the tensor's bytes from byte `offset` on.

        Raises:
          CheckpointError: the file cannot be read or became shorter.
        """
        entry = self.tensors[name]
        if offset < 0 or offset + out.nbytes > entry.nbytes:
            raise ValueError(f"bytes {offset} to {offset + out.nbytes} of {name!r}, which has {entry.nbytes}")
        self._fill(as_bytes(out), self._data_start + entry.start + offset)

    def close(self) -> None:
        """Close the file; reading is no longer possible."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fill(self, out: np.ndarray, offset: int) -> None:
        fill_from(self._fd, out, offset, self.path)


def fill_from(fd: int, out: np.ndarray, offset: int, path: Path) -> None:
    """Fill `out` (uint8 `[n]`, contiguous) from byte `offset` of an open file; `path` is for messages.

    Raises:
      CheckpointError: the file cannot be read or ends before.
    """
    view = memoryview(out)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{str(path)!r} is truncated: it ends at byte {offset + done}")
        done += count


def parse_header(header: bytes, path: str) -> dict[str, TensorEntry]:
    """The tensors that a header describes, in the order of their bytes; `path` is for messages.

    Raises:
      CheckpointError: the header breaks the format.
    """
    try:
        fields = parse_json(header)
    except ValueError as error:
        raise CheckpointError(f"{path!r} has a malformed safetensors header: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path!r} has a malformed safetensors header: not a JSON object")
    fields.pop("__metadata__", None)
    entries = {name: _entry(name, value, path) for name, value in fields.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise CheckpointError(f"{path!r}: tensor {name!r} starts at byte {entry.start}, expected {end}")
        end += entry.nbytes
    return entries


def _entry(name: str, value: Any, path: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path!r}: tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_CODE:
        raise CheckpointError(f"{path!r}: tensor {name!r} has unknown dtype {dtype!r:.80}")
    if not _are_counts(shape):
        raise CheckpointError(f"{path!r}: tensor {name!r} has shape {shape!r:.80}, not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path!r}: tensor {name!r} has data_offsets {offsets!r:.80}, not [begin, end]")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * BITS_OF_CODE[dtype] != nbytes * 8:
        raise CheckpointError(f"{path!r}: tensor {name!r} of {dtype} {shape!r:.80} cannot take {nbytes} bytes")
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=offsets[0], nbytes=nbytes)


def _are_counts(values: Any) -> bool:
    # bool is an int in Python. 2**63 and a rank of 64 bound the arithmetic on hostile headers.
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def parse_json(data: bytes) -> Any:
    """JSON from UTF-8 bytes, refusing duplicate keys.

    Raises:
      ValueError: with one line that says what is wrong.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice!r:.80}")
    return fields
