"""Files that are written whole or not at all, and over no other unless that is asked for."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ef_jax.errors import InputError


def check_new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a file that exists, unless it may be overwritten, or whose directory does not.

    Raises:
      InputError: it cannot be used.
    """
    path = Path(path)
    try:
        if not path.name or path.is_dir():
            raise InputError(f"{str(path)!r} is a directory: give the name of a file")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
        if not overwrite and os.path.lexists(path):
            raise InputError(f"{str(path)!r} exists: remove it or choose another name")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror}") from None


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which appears as `path` once the body has ended without an error.

    Raises:
      InputError: the file exists and `overwrite` is not given, or it cannot be written.
    """
    path = Path(path)
    check_new_file(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror or error}") from None
