"""Writes a synthetic checkpoint straight in the converted layout, as fast as the disk and in little memory.

What `ef-convert` would make of `bench.make_synthetic`'s original, without the original: a directory for each array,
manifest and checksums. There is no Orbax metadata, which only Orbax itself would read.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.make_synthetic import Synthetic, Weights, config_of
from ef_jax.weights.converted import DENSE, SOURCE, block_name, layer_dir
from ef_jax.weights.dtypes import WEIGHT_DTYPES
from ef_jax.weights.layout import Layout
from ef_jax.weights.manifest import NAME, Manifest
from ef_jax.weights.zarr_array import raw_metadata, raw_trailer

_WRITERS = 8  # each waits for the disk once a file


def write_converted(directory: Path, shape: Synthetic) -> int:
    """Write a converted checkpoint of `shape` into the new `directory`; the bytes of its weights.

    Raises:
      FileExistsError: `directory` exists.
      UnsupportedError: the family does not allow the shape.
    """
    config = json.dumps(config_of(shape), indent=2).encode() + b"\n"
    spec, source = shape.spec, Weights(shape.seed)
    directory.mkdir()
    (directory / SOURCE).mkdir()
    (directory / SOURCE / "config.json").write_bytes(config)
    dense = {}
    for name, one in Layout(spec, "per_expert").dense.items():
        dtype = WEIGHT_DTYPES[one.dtype or spec.dtype]
        runs = [run.astype(dtype) for run in source.runs(name, one.shape)]
        dense[name] = _write_array(directory / DENSE / "state" / name, one.shape, dtype, runs)
    layers: dict[int, list[int]] = {}
    form = spec.block_format

    def write(layer: int, expert: int, runs: list[np.ndarray]) -> int:
        return _write_array(layer_dir(directory, layer) / "state" / block_name(expert), form.shape, form.dtype, runs)

    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
        for layer in spec.moe_layers:
            runs = [list(source.runs("block", form.shape)) for _ in range(spec.experts.count)]  # views, of no size
            layers[layer] = list(pool.map(write, [layer] * len(runs), range(len(runs)), runs))
    manifest = Manifest(
        spec=spec.as_dict(),
        dtype=spec.dtype,
        experts="per_expert",
        nbytes=shape.nbytes,
        fingerprint="synthetic",
        files={"config.json": zlib.crc32(config)},
        dense=dense,
        layers=layers,
        complete=True,
    )
    (directory / NAME).write_bytes(manifest.to_json())
    return shape.nbytes


def _write_array(directory: Path, shape: tuple[int, ...], dtype: np.dtype, runs: Iterable[np.ndarray]) -> int:
    """One array, written to the disk and forgotten by the page cache; its checksum."""
    chunk = directory.joinpath("c", *("0" for _ in shape))
    chunk.parent.mkdir(parents=True)
    (directory / "zarr.json").write_text(json.dumps(raw_metadata(dtype, shape)))
    checksum = nbytes = 0
    with open(chunk, "wb", buffering=0) as file:
        for run in runs:
            view = run.view(np.uint8).data
            checksum = zlib.crc32(view, checksum)
            nbytes += len(view)
            while len(view):
                view = view[file.write(view) :]
        file.write(raw_trailer(nbytes))
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksum
