"""Compiled programs, kept as `jax.jit` would keep them: loading a model again compiles nothing."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

Compiled = Callable[..., Any]

_EXECUTABLES: dict[Hashable, jax.stages.Compiled] = {}
_MOST_EXECUTABLES = 256


def executable(place: Hashable, compile_it: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
    """The executable that is known by `place`, compiled if there is none yet."""
    if place not in _EXECUTABLES:
        _EXECUTABLES[place] = compile_it()
        while len(_EXECUTABLES) > _MOST_EXECUTABLES:
            _EXECUTABLES.pop(next(iter(_EXECUTABLES)))
    return _EXECUTABLES[place]


def ask_in_parallel(programs: Sequence[Callable[[], Any]]) -> None:
    """Ask for programs on a few threads: XLA compiles without the GIL."""
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(program) for program in programs]:
            future.result()
