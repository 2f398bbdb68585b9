"""Do forecasts of speed come true?

    python -m bench.forecast [--only recorded overlap runs] [--machine NAME|FILE] [--save]

recorded: forecasts by the figures of `cpu-emulated-pcie3` against the runs that bench/results has of that CPU, by
  arithmetic alone. Those that gave the figures ("calibrates") are left out of the summary.
overlap: what a forecast takes prefetching to hide, against replays of the bundled model's routing on a virtual clock.
runs: forecasts against runs made now, over emulated links at which the link is what takes time (PCIe 3.0 and 4.0 at
  their usable rates, scaled down by the size of a block over one of Qwen3-30B-A3B's) and over one at which it is not.
  The figures are measured first, in the same process, unless --machine names a profile. A busy machine makes figures
  and runs of different moments: believe it only where the load average is low.

"forecast / measured" is of tokens a second, 1 being right, with the hit rate that the cache's size suggests ("prior")
and, in runs, with that of a replay of the run's own routing ("trace"), which leaves the times to be wrong. The aim is
0.75 to 1.25. "in band" says whether the measured rate is between the forecast's low and high.

Prints tables, then one line of JSON.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import _report

_PARTS = ("recorded", "overlap", "runs")
_MODELS = ("bundled", "synthetic")


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS), metavar="PART")
    parser.add_argument("--machine", metavar="NAME|FILE", help="figures for part runs (default: measure them)")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS), metavar="NAME")
    parser.add_argument("--shape", metavar="SHAPE", default="D=512,F=256,E=32,K=4,L=6,V=4096", help="of part runs")
    parser.add_argument("--tokens", type=_report.positive, default=64, help="to decode in a run")
    parser.add_argument("--repeats", type=_report.positive, default=3)
    parser.add_argument("--batches", nargs="+", type=_report.positive, default=[1, 4], metavar="N")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.125, 0.5], metavar="X")
    parser.add_argument("--scratch", type=Path, help="directory for made-up weights")
    _report.add_save_option(parser, "forecast")
    options = parser.parse_args()
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "recorded": _recorded,
        "overlap": _overlap,
        "runs": _runs,
    }
    _report.finish("forecast", {part: parts[part](options) for part in options.only}, options.save)
    return 0


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _forecast_recorded

    return _forecast_recorded.run()


def _overlap(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _forecast_overlap

    return _forecast_overlap.run(options.tokens)


def _runs(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _forecast_runs

    return _forecast_runs.run(options)


if __name__ == "__main__":
    sys.exit(_report.run("forecast", main))
