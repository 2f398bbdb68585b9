"""What every bench prints: a table, then one last line of strict JSON with machine, versions, command and commit."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ef_jax.errors import InputError

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "bench" / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def run(name: str, body: Callable[[], int]) -> int:
    """Run a bench's `main`; bad input and a full disk end in one line on stderr and exit code 2."""
    try:
        return body()
    except (InputError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def add_save_option(parser: argparse.ArgumentParser, name: str) -> None:
    """`--save [PATH]`: also write the JSON to a file, `bench/results/NAME.json` by default."""
    parser.add_argument(
        "--save", nargs="?", const=result_path(name), type=Path, metavar="PATH", help="also write the JSON there"
    )


def result_path(name: str) -> Path:
    """Where the saved result of a bench is."""
    return _RESULTS / f"{name}.json"


def positive(text: str) -> int:
    """Parses a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least and largest of repeated measurements, to six digits, and how many there were."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "repeats": len(values),
    }


def rounded(value: float) -> float:
    """`value` to six significant digits."""
    return float(f"{value:.6g}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as they need: the first to the left, the others to the right; None is a dash."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def finish(name: str, result: dict[str, Any], save: Path | None = None, packages: Sequence[str] = ()) -> None:
    """Print the last line of a bench, and write it to `save`.

    Args:
      name: the bench's module.
      result: what was measured; NaN and infinities are refused, because nothing measures them.
      save: file to write, directories included.
      packages: further distributions whose versions matter.
    """
    contents = {"bench": name, **result, "run": description(name, packages)}
    line = json.dumps(contents, allow_nan=False)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(contents, allow_nan=False, indent=1) + "\n")
    print(line)


def description(name: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Where, when and by which command and commit a result came about. Absolute paths are cut to their last part."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", f"bench.{name}", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "machine": machine(),
        "versions": _versions([*_PACKAGES, *packages]),
    }


def machine() -> dict[str, Any]:
    """CPU model, usable cores, RAM in bytes, system; the load average says how quiet the machine was."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": rounded(os.getloadavg()[0]),
    }


def devices() -> list[str]:
    """The JAX devices by kind; starts a backend."""
    import jax

    return [device.device_kind for device in jax.devices()]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it; None outside of git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
