"""How many experts do steps use that are made of tokens with similar routes, and what does it take to find them?

    python -m bench.token_scheduler TRACE [--fit 300] [--paths FILE] [--only unions optimum cost] [--save]

TRACE is a file of `ef-jax trace`, or a plain npz. Rows are tokens of different sequences after the first `--fit`, drawn
with a seed. Groupings go by predictions: bins `[N, L, E]` for the trace (an npy file; `predict.path_bins` makes them),
or what tokens of an id used in the first `--fit`; or by the true routes. What counts is what groups then truly use, in
sum over groups, as a share of what random groups use.

unions: groupings (`bench/_groupings.py`) by rows and group size, means over draws.
optimum: the same for few rows, with the smallest union there is, found by trying all.
cost: milliseconds for 64 rows of 48 layers x 128 experts, made up from the trace's predictions side by side.

Prints tables, then one line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import _report
from bench._groupings import GROUPINGS, Grouping, best, shuffled, union
from bench._path_baselines import bins_of, token_table
from ef_jax.errors import InputError
from ef_jax.predict.log_odds import NOMINAL
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.token_scheduler import Groups, regroup

TARGET_MS = 2.0
SIZES = ((8, 4), (16, 8), (32, 16), (64, 32), (16, 4), (32, 4), (64, 16), (64, 8))
SMALL = ((6, 3), (8, 4), (10, 5))
_COST_SHAPE = {"rows": 64, "layers": 48, "experts": 128}


def main() -> int:
    """Run the bench; the exit code."""
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {"unions": unions, "optimum": optimum, "cost": cost}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", help="routing trace")
    parser.add_argument("--fit", type=_report.positive, metavar="N", help="sequences to predict from (five sixths)")
    parser.add_argument("--paths", type=Path, metavar="FILE", help="predictions (default: by token id)")
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--draws", type=_report.positive, default=24)
    _report.add_save_option(parser, "token_scheduler")
    options = parser.parse_args()
    trace = RoutingTrace.load(options.trace)
    options.trace, options.bins = with_paths(trace, options.fit, options.paths)
    result: dict[str, Any] = {"trace": repr(trace), "paths": "token id" if options.paths is None else "file"}
    for part in options.only:
        result[part] = parts[part](options)
    _report.finish("token_scheduler", result, options.save)
    return 0


def with_paths(trace: RoutingTrace, fit: int | None, paths: Path | None) -> tuple[RoutingTrace, np.ndarray]:
    """The sequences after the first `fit` (None: five sixths), and bins `[N, L, E]` for them: from a file that has them
    for the whole trace, or by token id from the sequences before.

    Raises:
      InputError: no sequences are left on one of the two sides, or the file does not fit.
    """
    fit = trace.sequences * 5 // 6 if fit is None else fit
    counted = trace.select(fit)
    if paths is None:
        return counted, bins_of(token_table([trace.select(0, fit)], counted))
    bins = np.load(paths, mmap_mode="r", allow_pickle=False)
    shape = (trace.count, trace.layers, trace.num_experts)
    if bins.dtype != np.uint8 or bins.shape != shape:
        raise InputError(f"{paths} holds {bins.dtype} of shape {bins.shape}, and uint8 of shape {shape} is needed")
    return counted, bins[-counted.count :]


class _Draws:
    """Rows of different sequences, as long as there are enough."""

    def __init__(self, trace: RoutingTrace, bins: np.ndarray, seed: int) -> None:
        self._trace, self._bins = trace, bins
        self._random = np.random.default_rng(seed)

    def draw(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """True routes and predicted chances, `[rows, L, E]`."""
        trace = self._trace
        chosen = self._random.choice(trace.sequences, rows, replace=rows > trace.sequences)
        index = self._random.integers(trace.offsets[chosen], trace.offsets[chosen + 1])
        true = np.zeros((rows, trace.layers, trace.num_experts), np.float32)
        np.put_along_axis(true, trace.experts[index].astype(np.intp), 1.0, axis=2)
        return true, NOMINAL[self._bins[index]]


def unions(options: argparse.Namespace) -> dict[str, Any]:
    """Part "unions"."""
    cells = [_compare(options, rows, size, GROUPINGS) for rows, size in SIZES]
    _show("experts used, % of random groups", cells)
    return {"draws": options.draws, "cells": cells}


def optimum(options: argparse.Namespace) -> dict[str, Any]:
    """Part "optimum"."""
    cells = [_compare(options, rows, size, {**GROUPINGS, "best": best}) for rows, size in SMALL]
    _show("few rows", cells)
    return {"draws": options.draws, "cells": cells}


def _compare(options: argparse.Namespace, rows: int, size: int, groupings: dict[str, Grouping]) -> dict[str, Any]:
    draws = _Draws(options.trace, options.bins, seed=rows * 100 + size)
    used: dict[str, dict[str, float]] = {
        "predicted": dict.fromkeys(groupings, 0.0),
        "true": dict.fromkeys(groupings, 0.0),
    }
    random = 0.0
    for _ in range(options.draws):
        true, predicted = draws.draw(rows)
        random += union(true, shuffled(true, size))
        for by, chances in (("predicted", predicted), ("true", true)):
            for name, grouping in groupings.items():
                used[by][name] += union(true, grouping(chances, size))
    shares = {by: {name: _report.rounded(each / random) for name, each in sums.items()} for by, sums in used.items()}
    return {"rows": rows, "size": size, "random": _report.rounded(random / options.draws), **shares}


def _show(title: str, cells: list[dict[str, Any]]) -> None:
    names = list(cells[0]["predicted"])
    head = [title, *names, *(f"true: {name}" for name in names[1:]), "random, experts"]
    rows = [
        (
            f"{cell['rows']} in groups of {cell['size']}",
            *(100 * cell["predicted"][name] for name in names),
            *(100 * cell["true"][name] for name in names[1:]),
            cell["random"],
        )
        for cell in cells
    ]
    print(_report.table(head, [[row[0], *(f"{value:.1f}" for value in row[1:])] for row in rows]) + "\n")


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Part "cost"."""
    rows, layers, experts = _COST_SHAPE.values()
    random, bins = np.random.default_rng(0), options.bins
    across, down = -(-experts // bins.shape[2]), -(-layers // bins.shape[1])
    pieces = [[bins[random.integers(len(bins), size=rows)] for _ in range(across)] for _ in range(down)]
    paths = np.concatenate([np.concatenate(piece, axis=2) for piece in pieces], axis=1)[:, :layers, :experts]
    paths = np.ascontiguousarray(paths)
    result: dict[str, Any] = {"shape": list(paths.shape), "target_ms": TARGET_MS}
    for size in (32, 16, 8):
        result[f"groups of {size}"] = _report.spread([_milliseconds(lambda: regroup(paths, size)) for _ in range(50)])  # noqa: B023
    table = [(name, spread["median"], spread["min"]) for name, spread in result.items() if isinstance(spread, dict)]
    print(_report.table((f"ms for {rows} rows of {layers} x {experts}", "median", "least"), table) + "\n")
    return result


def _milliseconds(work: Callable[[], Groups]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(_report.run("token_scheduler", main))
