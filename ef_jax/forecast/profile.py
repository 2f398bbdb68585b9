"""Profiles: what `ef-jax doctor` has measured of this machine, kept as JSON in the user's cache directory."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ef_jax.errors import InputError
from ef_jax.forecast.machine import Machine
from ef_jax.new_file import new_file

VERSION = 1
_KIND = "ef-jax machine profile"
_MOST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A measured machine.

    Attributes:
      machine: the figures that forecasts go by.
      measured: when, with which versions, and every single figure, for people.
    """

    machine: Machine
    measured: dict[str, Any]


def default_profile() -> Path:
    """Where the profile of this machine is: `machine.json` in `$XDG_CACHE_HOME/ef_jax`, or in `~/.cache/ef_jax`.

    Raises:
      InputError: there is no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        raise InputError("there is no home directory for the profile: set XDG_CACHE_HOME or give --profile") from None
    return cache / "ef_jax" / "machine.json"


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile, over an older one; directories are made.

    Raises:
      InputError: it cannot be written.
    """
    contents = {"kind": _KIND, "version": VERSION, "machine": profile.machine.as_dict(), "measured": profile.measured}
    make_directory(path)
    with new_file(path, overwrite=True) as file:
        file.write((json.dumps(contents, allow_nan=False, indent=1) + "\n").encode())


def make_directory(path: Path) -> None:
    """Have a directory for the profile at `path` that can be written to.

    Raises:
      InputError: there can be none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
        is_directory = path.is_dir()
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror}: give another --profile") from None
    if is_directory:
        raise InputError(f"{str(path)!r:.200} is a directory: give the name of a file as --profile")
    if not writable:
        raise InputError(f"cannot write {str(path)!r:.200}: Permission denied: give another --profile")


def read_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
      InputError: there is none, or it is malformed or of another version.
    """
    again = "run ef-jax doctor again"
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MOST_BYTES + 1))
    except FileNotFoundError:
        raise InputError(f"there is no profile {str(path)!r:.200}: run ef-jax doctor first") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InputError(f"cannot read the profile {str(path)!r:.200}: {reason}: {again}") from None
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise InputError(f"{str(path)!r:.200} is not a profile that ef-jax doctor wrote: {again}")
    if data.get("version") != VERSION:
        raise InputError(
            f"the profile {str(path)!r:.200} has version {data.get('version')!r:.40}, and this one reads {VERSION}: "
            f"{again}"
        )
    measured = data.get("measured")
    try:
        machine = Machine.from_dict(data.get("machine"))
    except InputError as error:
        raise InputError(f"the profile {str(path)!r:.200} is damaged: {error}: {again}") from None
    return Profile(machine=machine, measured=measured if isinstance(measured, dict) else {})
