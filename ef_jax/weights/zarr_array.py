"""Reads one array of an Orbax checkpoint straight into the caller's memory.

Orbax writes an uncompressed, unsharded array as `zarr.json` beside a single file that holds the array's bytes and an
index of 20 bytes (zarr 3, codec `sharding_indexed` with one inner chunk). Such a file is read with one `preadv`.
"""

import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.weights.dtypes import as_bytes
from ef_jax.weights.safetensors import fill_from, parse_json


def read_raw_array(directory: Path, out: np.ndarray) -> bool:
    """Fill `out` (C-contiguous) from the zarr array in `directory`, if its bytes lie there as they are in memory.

    Returns:
      False if the array is stored in another way (then nothing is read).

    Raises:
      CheckpointError: the array is missing, truncated, or not of `out`'s shape and dtype.
    """
    chunk = raw_file(directory, out.dtype, out.shape)
    if chunk is None:
        return False
    index = np.empty(len(raw_trailer(out.nbytes)), np.uint8)
    try:
        fd = os.open(chunk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot open {str(chunk)!r}: {error.strerror}") from None
    try:
        size = os.fstat(fd).st_size
        if size != out.nbytes + index.nbytes:
            raise CheckpointError(f"{str(chunk)!r} has {size} bytes, expected {out.nbytes + index.nbytes}")
        fill_from(fd, as_bytes(out), 0, chunk)
        fill_from(fd, index, out.nbytes, chunk)
    finally:
        os.close(fd)
    if index.tobytes() != raw_trailer(out.nbytes):
        raise CheckpointError(f"{str(chunk)!r} is damaged: its chunk index is not that of one chunk")
    return True


def raw_file(directory: Path, dtype: np.dtype[Any], shape: Sequence[int]) -> Path | None:
    """The file that holds an array's bytes from its first byte on, then `raw_trailer`; None: it is stored otherwise.

    Raises:
      CheckpointError: there is no array in `directory`, or one of another dtype or shape.
    """
    metadata_file = directory / "zarr.json"
    try:
        metadata = parse_json(metadata_file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {str(metadata_file)!r}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{str(metadata_file)!r} is not valid JSON: {error}") from None
    sizes = list(shape)
    if not isinstance(metadata, dict) or metadata.get("shape") != sizes or metadata.get("data_type") != dtype.name:
        raise CheckpointError(f"{str(metadata_file)!r} does not describe an array of {dtype.name} {sizes}")
    if metadata != raw_metadata(dtype, tuple(sizes)):
        return None
    return directory.joinpath("c", *("0" for _ in sizes))


@functools.lru_cache(maxsize=64)
def raw_metadata(dtype: np.dtype[Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """zarr.json of an array that Orbax stores raw."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(shape),
        "codecs": [little_endian if dtype.itemsize > 1 else {"name": "bytes"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


@functools.lru_cache(maxsize=64)
def raw_trailer(nbytes: int) -> bytes:
    """The index of a shard whose one chunk takes `nbytes` from offset 0: offset, length, CRC-32C of the two."""
    entry = struct.pack("<QQ", 0, nbytes)
    crc = 0xFFFFFFFF
    for byte in entry:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return entry + struct.pack("<I", crc ^ 0xFFFFFFFF)
