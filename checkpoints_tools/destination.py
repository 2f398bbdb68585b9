"""The directory that a conversion writes: checked before the first byte, in place only when it is whole."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ef_jax.errors import CheckpointError, InputError

_MAX_REMOVALS = 200
_REMOVAL_PAUSE_SECONDS = 0.05
_ABSENCES = 6


def check_new(destination: Path, needed_bytes: int) -> None:
    """Refuse a destination that exists, has no parent directory, or whose disk is too full.

    Raises:
      InputError: it cannot be used; nothing was written.
    """
    if os.path.lexists(destination):
        raise InputError(f"destination {str(destination)!r} exists: remove it or choose another")
    if not destination.parent.is_dir():
        raise InputError(f"destination {str(destination)!r}: there is no directory {str(destination.parent)!r}")
    if not os.access(destination.parent, os.W_OK | os.X_OK):
        raise InputError(f"destination {str(destination)!r}: {str(destination.parent)!r} is not writable")
    check_space(destination.parent, needed_bytes)


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse a disk with less than `needed_bytes` free.

    Raises:
      InputError: it has less.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise InputError(
            f"the disk of {str(directory)!r} has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed:"
            f" free some or choose another destination"
        )


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A new directory beside `destination` that takes its name at the end, or vanishes if the body fails."""
    stage = destination.with_name(f".{destination.name}.partial")
    with reporting_write_errors(destination):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            yield stage
            stage.rename(destination)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def remove(directory: Path) -> None:
    """Remove a directory that threads may still be writing to.

    TensorStore's threads go on after a failed save, and make the directory anew for a file that they still had to
    write: so it counts as removed once it has stayed away for a while.
    """
    absences = 0
    for _ in range(_MAX_REMOVALS):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(_REMOVAL_PAUSE_SECONDS)
        absences = 0 if directory.exists() else absences + 1
        if absences == _ABSENCES:
            return
    raise WriteError(f"cannot remove {str(directory)!r}: remove it by hand")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that two conversions never write to one destination.

    Raises:
      InputError: another process holds it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"another conversion is writing to {str(directory)!r}: wait for it to end") from None
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file's content, durably: after a crash it is the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class WriteError(InputError):
    """The destination cannot be written: full, read-only or failing."""


@contextlib.contextmanager
def reporting_write_errors(destination: Path) -> Iterator[None]:
    """Turn an operating system's error in the body into one line about `destination`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {str(destination)!r}: {error.strerror or error}") from error
    except (CheckpointError, InputError):
        raise
    except Exception as error:
        if (reason := _storage_reason(error)) is None:
            raise
        raise WriteError(f"cannot write {str(destination)!r}: {reason}") from error


_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


def _storage_reason(error: BaseException) -> str | None:
    """The operating system's words in an error that TensorStore or Orbax wrapped, or None if it holds none."""
    if isinstance(error, BaseExceptionGroup):
        return next((reason for inner in error.exceptions if (reason := _storage_reason(inner))), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    for number in _STORAGE_ERRNOS:
        if os.strerror(number) in text:
            return os.strerror(number)
    return _storage_reason(error.__cause__) if error.__cause__ is not None else None
