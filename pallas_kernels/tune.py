"""Measures tile configurations on the device at hand and writes them to its data file.

    python -m pallas_kernels.tune --shape 2048,1024,64,8 --rows 64,1024

tunes a feed-forward network of D 2048, F 1024, 64 experts, 8 of them a token, for 64 and 1,024 route-sorted rows. Every
candidate's result is compared with the `xla` backend's; one that is wrong, or does not compile, is named and passed
over. See `pallas_kernels/grouped_ffn/tiles.py` for what the entries are found by.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_ffn.api import grouped_ffn
from pallas_kernels.grouped_ffn.backends import BACKENDS
from pallas_kernels.grouped_ffn.problem import Problem, fitting_tile_rows
from pallas_kernels.grouped_ffn.quantized import FORMATS, lossy_quantize
from pallas_kernels.grouped_ffn.storage import to_storage
from pallas_kernels.grouped_ffn.target import default_target
from pallas_kernels.grouped_ffn.tiles import (
    DIRECTORY,
    KEY_FIELDS,
    Tiles,
    file_name,
    forced_tiles,
    key,
    write_entries,
)

TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-5}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    made.add_argument("--shape", action="append", required=True, metavar="D,F,E,K", type=_integers(4))
    made.add_argument("--rows", default="64", metavar="M,...", help="route-sorted rows, e.g. 64,1024 (default 64)")
    made.add_argument("--dtype", default="bfloat16", choices=tuple(TOLERANCE))
    made.add_argument("--storage", default="dense", choices=("dense", *FORMATS))
    made.add_argument("--backend", action="append", choices=tuple(BACKENDS), help="default: all that have tiles")
    made.add_argument("--seconds", type=float, default=0.2, help="to measure a candidate for (default 0.2)")
    made.add_argument("--out", type=Path, default=DIRECTORY, help="directory of data files (default: the package's)")
    made.add_argument("--json", action="store_true", help="one line of JSON at the end")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes what the command line names; 0, or 2 for input that cannot be."""
    options = parser().parse_args(arguments)
    try:
        rows = [int(part) for part in options.rows.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        return _refuse(f"--rows must be positive integers with commas between, got {options.rows!r}")
    if not options.out.is_dir():
        return _refuse(f"--out {str(options.out)!r} is not a directory")
    target = default_target()
    entries = []
    for hidden, width, experts, top_k in options.shape:
        for count in rows:
            problem = Problem(
                rows=count,
                groups=experts,
                slots=experts,
                contract=hidden,
                width=width,
                dtype=np.dtype(jnp.dtype(options.dtype)),
                storage=options.storage,
                activation="silu",
                tile_rows=fitting_tile_rows(count, min(experts, count * top_k)),
                target=target,
            )
            for name in options.backend or BACKENDS:
                entries += tune(name, problem, seconds=options.seconds, say=partial(print, file=sys.stderr))
    if not entries:
        print(f"nothing to tune on {target.device_kind}: no backend with tiles runs there", file=sys.stderr)
    else:
        path = options.out / file_name(target.device_kind)
        write_entries(path, target.device_kind, entries)
        print(f"{len(entries)} entries in {path}", file=sys.stderr)
    if options.json:
        print(json.dumps({"device_kind": target.device_kind, "jax": jax.__version__, "entries": entries}))
    return 0


def tune(name: str, problem: Problem, *, seconds: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The best tiles of gate-and-up, and with those of down, for one backend: entries of a data file.

    Empty where the backend refuses the problem or has nothing to tune.

    Args:
      name: of the backend.
      problem: what to tune for; its groups get rows as evenly as they come.
      seconds: to measure each candidate for.
      say: takes a line of progress.
    """
    backend = BACKENDS[name]
    if reason := backend.refuses(problem):
        say(f"{name}: {reason}")
        return []
    arguments = _arguments(problem)
    expected = np.asarray(_program(problem, "xla")(*arguments), np.float32)
    chosen: dict[str, Tiles] = {}
    entries = []
    for operation in ("gate_up", "down"):
        measured = []
        for tiles in backend.candidates(operation, problem):
            try:
                with forced_tiles(chosen | {operation: tiles}):
                    program = _program(problem, name).lower(*arguments).compile()
                wrong = np.abs(np.asarray(program(*arguments), np.float32) - expected).max()
            except Exception as error:  # whatever a compiler says of a configuration
                say(f"{name} {operation} {dict(tiles)}: {str(error).splitlines()[0]:.100}")
                continue
            if not wrong <= TOLERANCE[str(problem.dtype)] * np.abs(expected).max():
                say(f"{name} {operation} {dict(tiles)}: wrong by {wrong:.3g}")
                continue
            measured.append((_seconds(program, arguments, seconds), tiles))
            say(f"{name} {operation} {dict(tiles)}: {measured[-1][0] * 1e6:.1f} us")
        if not measured:
            continue
        best, tiles = min(measured, key=lambda pair: pair[0])
        chosen[operation] = tiles
        entries.append(
            dict(zip(KEY_FIELDS, key(name, operation, problem), strict=True))
            | {
                "tiles": dict(tiles),
                "seconds": best,
                "heuristic_seconds": measured[0][0],
                "candidates": len(measured),
                "rows": problem.rows,
                "groups": problem.groups,
                "jax": jax.__version__,
            }
        )
    return entries


def _program(problem: Problem, implementation: str) -> Any:
    return jax.jit(
        partial(
            grouped_ffn,
            activation=problem.activation or "silu",
            tile_rows=problem.tile_rows,
            implementation=implementation,
        )
    )


def _arguments(problem: Problem) -> tuple[Any, ...]:
    pool_key, row_key = jax.random.split(jax.random.key(0))
    shape = (problem.slots, 3, problem.width, problem.contract)
    blocks = jax.random.normal(pool_key, shape, problem.dtype) * problem.contract**-0.5
    pool = to_storage(blocks) if problem.storage == "dense" else lossy_quantize(blocks, problem.storage)
    x = jax.random.normal(row_key, (problem.rows, problem.contract), problem.dtype)
    sizes = np.diff(np.linspace(0, problem.rows, problem.groups + 1).astype(np.int32)).astype(np.int32)
    return x, pool, jnp.arange(problem.groups, dtype=jnp.int32), jnp.asarray(sizes)


def _seconds(program: Any, arguments: tuple[Any, ...], seconds: float) -> float:
    """Median over five rounds of the time of one call among many that are queued."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    calls = max(1, int(seconds / 5 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        results = [program(*arguments) for _ in range(calls)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def _integers(count: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(","))
        if len(values) != count or min(values) < 1:
            raise argparse.ArgumentTypeError(f"{count} positive integers with commas between are needed, got {text!r}")
        return values

    parse.__name__ = "shape"
    return parse


def _refuse(message: str) -> int:
    print(f"pallas_kernels.tune: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
