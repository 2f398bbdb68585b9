"""How many tokens a second come of many requests, what does each part of serving add, and in how little memory?

    python -m bench.throughput [TRACE] [--only replayed memory engine] [--fit 300] [--paths FILE] [--save]

The parts are described at the head of their modules, `bench/_throughput_*.py`:

replayed: requests whose tokens and routes are those of TRACE, on a virtual clock, at the shape of a real model.
memory: the smallest device memory in which decoding still runs.
engine: the bundled model, by the clock on the wall.

TRACE is a file of `ef-jax trace`, or a plain npz; `replayed` needs one. Its routes are predicted by bins `[N, L, E]` of
an npy file, or by what tokens of an id used in the first `--fit` sequences. Prints tables, then one line of JSON.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import _report
from bench._shapes import SHAPES
from ef_jax.errors import InputError
from ef_jax.replay.trace import RoutingTrace


def main() -> int:
    """Run the bench; the exit code."""
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "replayed": _replayed,
        "memory": _memory,
        "engine": _engine,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="routing trace")
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--fit", type=_report.positive, metavar="N", help="sequences to predict from (five sixths)")
    parser.add_argument("--paths", type=Path, metavar="FILE", help="predicted paths (default: by token id)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="deepseek_v2_lite", help="of the replayed model")
    parser.add_argument("--requests", type=_report.positive, default=64)
    parser.add_argument("--batch", type=_report.positive, default=8, help="sequences of a step (default: 8)")
    parser.add_argument("--rows", type=_report.positive, default=32, help="sequences held at once (default: 32)")
    parser.add_argument("--longest", type=_report.positive, default=1024, help="tokens of a request (default: 1024)")
    parser.add_argument("--links", nargs="+", choices=("balanced", "pcie"), default=["balanced", "pcie"])
    parser.add_argument("--repeats", type=_report.positive, default=5, help="of what is timed")
    parser.add_argument("--routing-path", type=Path, metavar="DIR", help="predictor of the bundled model, part engine")
    _report.add_save_option(parser, "throughput")
    options = parser.parse_args()
    result = {part: parts[part](options) for part in options.only}
    _report.finish("throughput", result, options.save)
    return 0


def _replayed(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _throughput_replayed

    if options.trace is None:
        raise InputError("part replayed needs a routing trace: give TRACE, or --only the other parts")
    trace = RoutingTrace.load(options.trace)
    result = _throughput_replayed.run(
        trace,
        fit=options.fit,
        paths=options.paths,
        shape=options.shape,
        requests=options.requests,
        batch=options.batch,
        rows=options.rows,
        longest=options.longest,
        links=tuple(options.links),
    )
    return {"trace": repr(trace), **result}


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _throughput_memory

    return _throughput_memory.run(options.repeats)


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _throughput_engine

    return _throughput_engine.run(options)


if __name__ == "__main__":
    sys.exit(_report.run("throughput", main))
