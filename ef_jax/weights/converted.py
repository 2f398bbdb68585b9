"""Reads a converted checkpoint: Orbax arrays in our own layout, one an expert block."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.weights.checkpoint import Checkpoint, check_finite
from ef_jax.weights.directory import tokenizer_dir
from ef_jax.weights.dtypes import WEIGHT_DTYPES, DtypeName
from ef_jax.weights.layout import Layout
from ef_jax.weights.manifest import Manifest, read_manifest
from ef_jax.weights.model_config import read_model_config, without_fp8
from ef_jax.weights.quantized import quantized_spec
from ef_jax.weights.zarr_array import raw_file, read_raw_array

DENSE = "dense"
SOURCE = "source"


class ConvertedCheckpoint(Checkpoint):
    """A converted checkpoint (see `Checkpoint`).

    Attributes:
      manifest: the checkpoint's manifest.
      reader: "raw" while arrays are read straight from their files, "orbax" once one had to go through Orbax.
    """

    format = "converted"

    def __init__(self, path: Path, dtype: DtypeName | None = None) -> None:
        """Open the converted checkpoint in the directory `path`.

        Args:
          path: the directory.
          dtype: must be the checkpoint's own if given; arrays are not converted while they are read.

        Raises:
          CheckpointError: the checkpoint is incomplete, malformed, or of another dtype.
        """
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        if not self.manifest.complete:
            raise CheckpointError(f"{str(path)!r} is an unfinished conversion: run the same ef-convert again")
        if dtype not in (None, self.manifest.dtype):
            raise CheckpointError(
                f"{str(path)!r} was converted to {self.manifest.dtype}: convert the original with --dtype {dtype}"
            )
        spec, self.generation_config = read_model_config(path / SOURCE)
        if self.manifest.experts != "fp8":
            spec = without_fp8(spec)
        self.spec = dataclasses.replace(spec, dtype=self.manifest.dtype)
        self.layout = Layout(self.spec, self.manifest.experts)
        if self.manifest.quantization is not None:
            self.spec = quantized_spec(self.spec, self.manifest.quantization)
        self.reader: Literal["raw", "orbax"] = "raw"
        self.nbytes = self.manifest.nbytes
        self.tokenizer_dir = tokenizer_dir(path / SOURCE)
        self._check_inventory()

    def dense(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.layout.dense:
            array = self.read_dense(name)
            check_finite(array, repr(name), self.path)
            yield name, array

    def read_dense(self, name: str) -> np.ndarray:
        """One array of our `layout.dense`, unchecked for NaN."""
        source = self.layout.dense[name]
        array = np.empty(source.shape, WEIGHT_DTYPES[source.dtype or self.spec.dtype])
        self._read(self.path / DENSE, name, array)
        return array

    def read_extra(self, name: str) -> np.ndarray:
        """One of the manifest's `extra` tensors as raw bytes, uint8 `[nbytes]`."""
        array = np.empty(self.manifest.extra[name], np.uint8)
        self._read(self.path / DENSE, name, array)
        return array

    def read_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        self._check_block(layer, expert, out)
        # Blocks were found finite when they were converted; looking again would cost a quarter of the reading.
        self._read(layer_dir(self.path, layer), block_name(expert), out)

    def block_file(self, layer: int, expert: int) -> Path | None:
        """The file that begins with a block's bytes as they are in memory, see `raw_file`; None: there is none.

        Raises:
          CheckpointError: the block is missing, or of another dtype or shape.
        """
        form = self.spec.block_format
        return raw_file(layer_dir(self.path, layer) / "state" / block_name(expert), form.dtype, form.shape)

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _read(self, checkpoint: Path, name: str, out: np.ndarray) -> None:
        if not read_raw_array(checkpoint / "state" / name, out):
            self._read_with_orbax(checkpoint, name, out)

    def _read_with_orbax(self, checkpoint: Path, name: str, out: np.ndarray) -> None:
        # Orbax takes seconds to import, and most checkpoints never need it.
        from orbax.checkpoint.experimental import v1 as ocp

        if self.reader == "raw":
            self.reader = "orbax"
            warnings.warn(f"{str(checkpoint)!r} is not stored raw: reading it through Orbax is slower", stacklevel=4)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                out[...] = ocp.load(checkpoint.absolute(), {name: np.empty_like(out)})[name]
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"Orbax cannot read {name!r} of {str(checkpoint)!r}: {reason:.300}") from error

    def _check_inventory(self) -> None:
        manifest = self.manifest
        if manifest.dense.keys() - manifest.extra.keys() != self.layout.dense.keys():
            raise CheckpointError(f"{str(self.path)!r}: manifest.json and source/config.json name different arrays")
        counts = {layer: len(checksums) for layer, checksums in manifest.layers.items()}
        in_fp8 = (self.spec.experts.quantization == "fp8", manifest.experts == "fp8")
        if counts != dict.fromkeys(self.spec.moe_layers, self.spec.experts.count) or in_fp8[0] != in_fp8[1]:
            raise CheckpointError(f"{str(self.path)!r}: manifest.json and source/config.json name different experts")


def layer_dir(path: Path, layer: int) -> Path:
    """The Orbax checkpoint of a decoder layer's experts."""
    return path / "layers" / f"{layer:05d}"


def block_name(expert: int) -> str:
    """The name of an expert's array in its layer's checkpoint."""
    return f"{expert:05d}"
