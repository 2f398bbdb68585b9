"""Reads expert blocks again and again, past the page cache, and makes sure that they are still those of the checkpoint.

A block that is paged is kept in host memory by whoever asked for it. A second copy in the page cache would be one too
many, and would push other programs' files out. So blocks of a converted checkpoint are read with O_DIRECT, a whole file
a call, into page-aligned memory. On the virtual disk of the machine of `bench.disk` that is also several times faster
than reading through the cache, where every 4 kB are copied once more and the kernel reads ahead in small pieces. Where
a file system has no such reads, pages are dropped as soon as they were read.
"""

import errno
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from ef_jax.choices import chosen
from ef_jax.errors import CheckpointError
from ef_jax.spec import ModelSpec
from ef_jax.weights.checkpoint import Checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint
from ef_jax.weights.zarr_array import raw_trailer

Checksums = Literal["first", "always", "never"]
PAGE = 4096

_Stamp = tuple[int, int, int, int]  # device, inode, bytes, time of the last change in ns


class BlockReader:
    """Reads the blocks of a checkpoint, any of them at any time, from several threads.

    Args:
      checkpoint: where they are; it stays open as long as the reader is used.
      checksums: when to compare a block of a converted checkpoint with its checksum in the manifest: "first" whenever
        a file is read for the first time or has changed since, "always", or "never". An original has no checksums; its
        blocks are looked through for NaN every time.

    Attributes:
      direct: blocks are read past the page cache.
      buffer_bytes: memory that one read needs, a multiple of `PAGE`.
    """

    def __init__(self, checkpoint: Checkpoint, *, checksums: Checksums = "first") -> None:
        self._checkpoint, self._checksums = checkpoint, checksums
        self._form = checkpoint.spec.block_format
        self._nbytes = checkpoint.spec.block_bytes
        self._trailer = raw_trailer(self._nbytes)
        self.buffer_bytes = read_bytes(checkpoint.spec)
        self._files: dict[tuple[int, int], Path] = {}
        self._seen: dict[tuple[int, int], _Stamp] = {}
        self._open_flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)
        first = checkpoint.spec.moe_layers[0], 0
        self.direct = isinstance(checkpoint, ConvertedCheckpoint) and self._file(*first) is not None

    def read(self, layer: int, expert: int, buffer: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, " nbytes"]:
        """Read one block; returns the part of `buffer` that holds it.

        Args:
          layer: decoder layer, one of `spec.moe_layers`.
          expert: index below E.
          buffer: `buffer_bytes`, from an address that is a multiple of `PAGE`.

        Raises:
          CheckpointError: the block is gone, truncated, changed or damaged, or cannot be read.
        """
        block = buffer[: self._nbytes]
        path = self._file(layer, expert) if self.direct else None
        if path is None:
            self._checkpoint.read_block(layer, expert, block.view(self._form.dtype).reshape(self._form.shape))
            return block
        try:
            stamp = self._read_file(path, buffer)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from None
        if bytes(buffer[self._nbytes : self._nbytes + len(self._trailer)]) != self._trailer:
            raise CheckpointError(f"{str(path)!r} is damaged: its chunk index is not that of one chunk")
        if self._checksums == "always" or (self._checksums == "first" and self._seen.get((layer, expert)) != stamp):
            self._check(layer, expert, block, path)
            self._seen[layer, expert] = stamp
        return block

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _file(self, layer: int, expert: int) -> Path | None:
        """The file that holds a block as it is in memory; None: there is none."""
        path = self._files.get((layer, expert))
        if path is None and isinstance(self._checkpoint, ConvertedCheckpoint):
            path = self._checkpoint.block_file(layer, expert)
            if path is not None:
                self._files[layer, expert] = path
        return path

    def _read_file(self, path: Path, buffer: UInt8[np.ndarray, " n"]) -> _Stamp:
        fd = self._open(path)
        try:
            status = os.fstat(fd)
            whole = self._nbytes + len(self._trailer)
            if status.st_size != whole:
                raise CheckpointError(f"{str(path)!r} has {status.st_size} bytes, expected {whole}")
            view, done = memoryview(buffer), 0
            while done < whole:
                count = os.preadv(fd, [view[done:]], done)
                done += count
                if done < whole and (count == 0 or done % PAGE):  # only the end of a file is no whole page
                    raise CheckpointError(f"{str(path)!r} is truncated: it ends at byte {done}")
            if not self._open_flags & getattr(os, "O_DIRECT", 0):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, self._open_flags)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._open_flags & getattr(os, "O_DIRECT", 0):
                raise
        self._open_flags &= ~os.O_DIRECT  # this file system has no direct reads
        return os.open(path, self._open_flags)

    def _check(self, layer: int, expert: int, block: UInt8[np.ndarray, " n"], path: Path) -> None:
        assert isinstance(self._checkpoint, ConvertedCheckpoint)
        if zlib.crc32(block) != self._checkpoint.manifest.layers[layer][expert]:
            changed = "has changed since it was read last" if (layer, expert) in self._seen else "is damaged"
            raise CheckpointError(f"{str(path)!r} {changed}: its checksum is not the manifest's")


def read_bytes(spec: ModelSpec) -> int:
    """Bytes of the buffer that one read of a block needs: block and trailer, up to a whole page."""
    return -(-(spec.block_bytes + len(raw_trailer(spec.block_bytes))) // PAGE) * PAGE


def check_checksums(name: str) -> Checksums:
    """`name`, if it says when checksums are compared.

    Raises:
      InputError: it does not.
    """
    return chosen("disk_checksums", name, Checksums)
