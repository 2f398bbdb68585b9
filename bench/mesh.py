"""Does each of several processes hold only its share of the experts? Peak memory of one process and of several.

    python -m bench.mesh MODEL --devices 8 --processes 1,2 --save

Runs `ef-jax generate --mesh expert=N` on N emulated CPU devices, in one process and shared among several on the
loopback interface, and reads each process's peak resident memory. In one process it should be the experts and what
every process needs besides; in P, a P-th of the experts and the same again. Tokens have to be the same. Prints a table,
then one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import _report
from ef_jax.errors import InputError
from tests.mesh.loopback import run_processes

_SECONDS = 3600.0
_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the exit code."""
    options = _parse(arguments)
    rows = [measure(options.model, options.devices, count, options.expert_fraction) for count in options.processes]
    if any(row["tokens"] != rows[0]["tokens"] for row in rows):
        raise InputError("tokens differ between numbers of processes")
    head = ("processes", "devices of each", "experts of each (MiB)", "peak RSS (MiB)")
    cells = [
        (str(row["processes"]), row["devices"], round(row["host_bytes"] / _MIB), _peaks(row["peak_rss"]))
        for row in rows
    ]
    print(_report.table(head, cells), end="\n\n")
    _report.finish("mesh", {"model": Path(options.model).name, "rows": rows}, options.save)
    return 0


def _peaks(peaks: Sequence[int]) -> str:
    return ", ".join(str(round(peak / _MIB)) for peak in peaks)


def measure(model: str, devices: int, processes: int, expert_fraction: float) -> dict[str, Any]:
    """Peak memory of each of `processes` processes that have `devices` devices in all.

    Raises:
      InputError: one of them failed.
    """
    words = [
        "-m",
        "ef_jax",
        "generate",
        "--model",
        str(Path(model).resolve()),
        "--token-ids=5,6,7",
        "--max-new-tokens=8",
        "--context=32",
    ]
    words += ["--chunk=8", f"--batch={devices}", f"--expert-fraction={expert_fraction}", f"--mesh=expert={devices}"]
    words += ["--json", *(["--distributed"] if processes > 1 else [])]
    outcomes = run_processes(words, processes=processes, devices=devices // processes, seconds=_SECONDS)
    for number, outcome in enumerate(outcomes):
        if outcome.code != 0:
            raise InputError(f"process {number} of {processes} ended with {outcome.code}: {outcome.err.strip()[-300:]}")
    result = json.loads(outcomes[0].out)
    return {
        "processes": processes,
        "devices": devices // processes,
        "host_bytes": result["plan"]["host_bytes"],
        "slots": result["plan"]["slots"],
        "block_bytes": result["plan"]["block_bytes"],
        "peak_rss": [outcome.peak_rss for outcome in outcomes],
        "tokens": result["tokens"],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.mesh", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory")
    parser.add_argument("--devices", type=_report.positive, default=8, metavar="N", help="in all (default: 8)")
    parser.add_argument(
        "--processes", type=_numbers, default=[1, 2], metavar="N,...", help="numbers of processes (default: 1,2)"
    )
    parser.add_argument("--expert-fraction", type=float, default=0.1, metavar="X", help="in slots (default: 0.1)")
    _report.add_save_option(parser, "mesh")
    options = parser.parse_args(arguments)
    for processes in options.processes:
        if options.devices % processes:
            raise InputError(f"{options.devices} devices cannot be shared by {processes} processes")
    return options


def _numbers(text: str) -> list[int]:
    return [_report.positive(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(_report.run("mesh", main))
