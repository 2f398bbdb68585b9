"""Reads every weight of a checkpoint and compares it with what was written down."""

import zlib
from pathlib import Path

import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.progress import Progress
from ef_jax.weights import Checkpoint
from ef_jax.weights.converted import SOURCE, ConvertedCheckpoint
from ef_jax.weights.directory import read_text_file
from ef_jax.weights.dtypes import as_bytes
from ef_jax.weights.manifest import Manifest


def verify(checkpoint: Checkpoint, manifest: Manifest | None = None, show_progress: bool | None = None) -> None:
    """Read all of a checkpoint: every array must be readable, finite and, where a checksum is known, unchanged.

    Args:
      checkpoint: an open checkpoint. A converted one is held against its own manifest.
      manifest: checksums that another checkpoint's arrays must have too.
      show_progress: draw a progress bar; None does so on a terminal.

    Raises:
      CheckpointError: the first thing that is wrong.
    """
    spec = checkpoint.spec
    if isinstance(checkpoint, ConvertedCheckpoint):
        manifest = checkpoint.manifest
        _verify_files(checkpoint.path, checkpoint.manifest)
        _verify_extra(checkpoint)
    with Progress(checkpoint.nbytes, "B", "verifying", enabled=show_progress) as progress:
        for name, array in checkpoint.dense():
            _compare(checkpoint.path, array, manifest.dense.get(name) if manifest else None, repr(name))
            progress.update(array.nbytes)
        block = np.empty(spec.block_format.shape, spec.block_format.dtype)
        for layer in spec.moe_layers:
            for expert in range(spec.experts.count):
                checkpoint.read_block(layer, expert, block)
                checksum = manifest.layers[layer][expert] if manifest else None
                _compare(checkpoint.path, block, checksum, f"layer {layer} expert {expert}")
                progress.update(block.nbytes)


def _verify_files(path: Path, manifest: Manifest) -> None:
    for name, checksum in manifest.files.items():
        if zlib.crc32(read_text_file(path / SOURCE / name)) != checksum:
            raise CheckpointError(f"{str(path / SOURCE / name)!r} differs from its checksum: convert again")


def _verify_extra(checkpoint: ConvertedCheckpoint) -> None:
    for name in checkpoint.manifest.extra:
        _compare(checkpoint.path, checkpoint.read_extra(name), checkpoint.manifest.dense[name], repr(name))


def _compare(path: Path, array: np.ndarray, checksum: int | None, what: str) -> None:
    if checksum is not None and zlib.crc32(as_bytes(array)) != checksum:
        raise CheckpointError(f"{what} of {str(path)!r} differs from its checksum: convert again")
