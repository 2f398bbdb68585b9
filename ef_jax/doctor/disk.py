"""How fast a file is read, and whether it came from the disk."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ef_jax.errors import InputError

_CHUNK = 8 << 20
_COLD = 0.9
_IO = Path("/proc/self/io")


def measure_disk(directory: Path, nbytes: int = 256 << 20) -> dict[str, Any]:
    """Write a file in `directory`, have the kernel forget it, and read it in order.

    The kernel may decline to forget, or the directory may be in memory. `page_cache` says what was seen: "cold" if at
    least 90 % of the bytes came from storage, "warm" if not, and then the rate is one of memory; "unknown" where the
    kernel does not say.

    Raises:
      InputError: the file cannot be written there.
    """
    nbytes -= nbytes % _CHUNK
    buffer = bytearray(os.urandom(_CHUNK))
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="ef-jax-doctor-", buffering=0) as file:
            for _ in range(0, nbytes, _CHUNK):
                if file.write(buffer) != _CHUNK:
                    raise InputError(f"the disk of {str(directory)!r:.200} is full: give another --disk-directory")
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            before, began = _storage_bytes(), time.perf_counter()
            while file.readinto(buffer):
                pass
            seconds, after = time.perf_counter() - began, _storage_bytes()
    except OSError as error:
        raise InputError(
            f"cannot write {nbytes >> 20} MiB in {str(directory)!r:.200}: {error.strerror}: give another "
            "--disk-directory"
        ) from None
    fetched = None if before is None or after is None else after - before
    cache = "unknown" if fetched is None else "cold" if fetched >= _COLD * nbytes else "warm"
    return {"bandwidth": nbytes / seconds, "bytes": nbytes, "page_cache": cache}


def _storage_bytes() -> int | None:
    """Bytes that storage has read for this process so far; None where the kernel does not say."""
    try:
        fields = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(fields["read_bytes"])
    except (OSError, KeyError, ValueError):
        return None
