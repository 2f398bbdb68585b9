"""Measured tile configurations: data files by device kind, written by `python -m pallas_kernels.tune`.

`tuned/<device kind>.json` holds a list of entries, each found by backend, operation, dtype of the rows, storage of the
weights, D, F and the height of a tile, which stands for rows an expert. It has the tiles and the measurement they come
from. A height, not M, is the key, so that a row's result never depends on how many rows there are. A directory named
by the variable `EF_JAX_TUNED` is searched before the files of the package.

Backends fall back on their own heuristics where nothing was measured.
"""

import contextlib
import contextvars
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pallas_kernels.grouped_ffn.problem import Problem

Operation = Literal["gate_up", "down", "matmul", "outer"]
Tiles = Mapping[str, int]
_T = TypeVar("_T")

DIRECTORY = Path(__file__).parent / "tuned"
VARIABLE = "EF_JAX_TUNED"

_forced: contextvars.ContextVar[Mapping[str, Tiles]] = contextvars.ContextVar("forced_tiles")


def find_tiles(backend: str, operation: Operation, problem: Problem) -> Tiles | None:
    """The measured tiles of an operation, or None where there are none for this device and problem.

    Raises:
      ValueError: a data file cannot be read.
    """
    forced = _forced.get({})
    if operation in forced:
        return forced[operation]
    name = file_name(problem.target.device_kind)
    own = os.environ.get(VARIABLE)
    for directory in ([Path(own)] if own else []) + [DIRECTORY]:
        entry = _entries(directory / name).get(key(backend, operation, problem))
        if entry is not None:
            return entry["tiles"]
    return None


def settle_tiles(
    backend: str, operation: Operation, problem: Problem, kind: type[_T], rule: Callable[[Operation, Problem], _T]
) -> _T:
    """The measured tiles of an operation as the backend's own `kind`, or those of its `rule`.

    Raises:
      ValueError: a data file cannot be read, or its tiles are none of this backend's.
    """
    measured = find_tiles(backend, operation, problem)
    if measured is None:
        return rule(operation, problem)
    try:
        return kind(**measured)
    except TypeError:
        raise ValueError(f"tiles {dict(measured)} of {operation} are not those of the {backend} backend") from None


@contextlib.contextmanager
def forced_tiles(tiles: Mapping[str, Tiles]) -> Iterator[None]:
    """Within it, programs are traced with these tiles, by operation; the tuner's way to try candidates."""
    token = _forced.set(tiles)
    try:
        yield
    finally:
        _forced.reset(token)


def file_name(device_kind: str) -> str:
    """Of the data file of a device kind."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def key(backend: str, operation: Operation, problem: Problem) -> tuple[Any, ...]:
    """What an entry is found by."""
    return (
        backend,
        operation,
        str(problem.dtype),
        problem.storage,
        problem.contract,
        problem.width,
        problem.tile_rows,
    )


KEY_FIELDS = ("backend", "operation", "dtype", "storage", "contract", "width", "tile_rows")


@functools.cache
def _entries(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(entry[name] for name in KEY_FIELDS): entry for entry in read_entries(path)}


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a data file; none where there is no such file.

    Raises:
      ValueError: the file is not such a list.
    """
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            _ = [entry[name] for name in (*KEY_FIELDS, "tiles")]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of tile configurations ({error!r}); write it anew by tuning") from None
    return entries


def write_entries(path: Path, device_kind: str, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a data file, in place of those with the same key."""
    merged = {tuple(entry[name] for name in KEY_FIELDS): entry for entry in [*read_entries(path), *entries]}
    ordered = [merged[each] for each in sorted(merged, key=str)]
    lines = ",\n".join("    " + json.dumps(entry) for entry in ordered)
    text = f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n{lines}\n  ]\n}}\n'
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    _entries.cache_clear()
