"""Does a checkpoint several times larger than the device budget convert, load and generate within its bounds?

    python -m bench.large [--bytes 6GB] [--budget 1GB] [--scratch DIR] [--keep] [--save]

Makes up a qwen3_moe checkpoint (no tokenizer), converts it with `ef-convert`, and generates from token ids under the
device budget, from the original and from the conversion, each stage in a process of its own (`bench._stage` defines
its figures). Both generate `--repeats` times, in turns; seconds and rates are then medians, with the least and the
largest in the JSON, and peaks the largest. Bounds: a stage's peak RSS is at most 1.15 x the checkpoint's bytes + 1 GB
(on a CPU the device's memory is part of it); peak device bytes are at most the budget; tokens and log-probabilities of
all runs are equal. Before a stage the files it reads are dropped from the page cache; a run is cold if the kernel then
fetched at least 90 % of their bytes from storage for it, else warm. Prints a table, then one line of JSON; exit code
1 if a bound is not shown to hold.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import _models, _report
from bench.make_synthetic import Synthetic, write_synthetic
from ef_jax.memory.sizes import format_bytes, parse_bytes

SHAPE = Synthetic(hidden=1024, width=512, experts=64, top_k=8, vocab=32768)
_RSS_FACTOR, _RSS_SLACK = 1.15, 10**9
_COLD = 0.9
_TIMED = ("load_seconds", "weights_seconds", "tokens_per_second")


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=parse_bytes, default="6GB", help="checkpoint size to come close to")
    parser.add_argument("--budget", type=parse_bytes, default="1GB", help="device memory")
    parser.add_argument("--tokens", type=_report.positive, default=16)
    parser.add_argument("--repeats", type=_report.positive, default=2)
    parser.add_argument("--scratch", type=Path, help="directory for the checkpoints, twice their size")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    _report.add_save_option(parser, "large")
    options = parser.parse_args()
    shape = SHAPE.of_bytes(options.bytes)
    work = Path(tempfile.mkdtemp(prefix="large-", dir=options.scratch))
    try:
        _models.require_disk(work, 2 * shape.nbytes)
        result = measure(work, shape, options)
    finally:
        if options.keep:
            print(f"kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    _report.finish("large", result, options.save)
    return 0 if result["within_bounds"] else 1


def measure(work: Path, shape: Synthetic, options: argparse.Namespace) -> dict[str, Any]:
    """Make, convert, and generate from both in `work`; prints the table, returns the JSON's own part."""
    original, converted = work / "original", work / "converted"
    began = time.perf_counter()
    written = write_synthetic(original, shape)
    make_seconds = time.perf_counter() - began
    runs: dict[str, list[dict[str, Any]]] = {"original": [], "converted": []}
    convert = _stage(original, "convert", str(original), str(converted))
    for _ in range(options.repeats):
        for path in (original, converted):
            runs[path.name].append(_stage(path, "generate", str(path), str(options.budget), str(options.tokens)))
    every = [run for part in runs.values() for run in part]
    outputs = [(run.pop("tokens"), run.pop("logprobs")) for run in every]
    rss_bound = int(_RSS_FACTOR * shape.nbytes + _RSS_SLACK)
    peaks = [run["peak_rss_bytes"] for run in (convert, *every)]
    checks = {
        "rss_within_bound": None if None in peaks else max(peaks) <= rss_bound,
        "device_within_budget": max(run["peak_device_bytes"] for run in every) <= options.budget,
        "outputs_equal": all(output == outputs[0] for output in outputs),
    }
    stages = {"convert": convert, **{name: _together(part) for name, part in runs.items()}}
    result = {
        "checkpoint": written,
        "converted_bytes": sum(file.stat().st_size for file in converted.rglob("*") if file.is_file()),
        "budget_bytes": options.budget,
        "rss_bound_bytes": rss_bound,
        "make_seconds": _report.rounded(make_seconds),
        "devices": _devices(),
        "stages": stages,
        **checks,
        "within_bounds": all(value is True for value in checks.values()),
    }
    _print(result)
    return result


def _together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of repeated runs: spreads of times and rates, the largest of byte counts and such."""
    figures: dict[str, Any] = {"page_cache": "/".join(dict.fromkeys(run["page_cache"] for run in runs))}
    for name in runs[0].keys() - figures.keys():
        values = [run[name] for run in runs]
        figures[name] = (
            _report.spread(values) if isinstance(values[0], float) else None if None in values else max(values)
        )
    return dict(sorted(figures.items()))


def _stage(source: Path, *words: str) -> dict[str, Any]:
    """Run a stage that reads `source`, from a cold page cache where that can be had."""
    _drop_from_page_cache(source)
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "bench._stage", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"stage {words[0]} of {source.name} ended with exit code {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    fetched = figures["storage_bytes"]
    figures["page_cache"] = "unknown" if fetched is None else "cold" if fetched >= _COLD * size else "warm"
    return figures


def _drop_from_page_cache(directory: Path) -> None:
    """Ask the kernel to forget what it keeps of a directory's files; it may decline."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _devices() -> list[str]:
    """The JAX devices, asked for in another process: this one must stay off the accelerator."""
    code = "import jax; print(*(device.device_kind for device in jax.devices()), sep='\\n')"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def _print(result: dict[str, Any]) -> None:
    size, budget = result["checkpoint"]["bytes"], result["budget_bytes"]
    print(f"{format_bytes(size)} in {result['checkpoint']['layers']} layers, budget {format_bytes(budget)}")
    rows = []
    for name, stage in result["stages"].items():
        peak, device = stage["peak_rss_bytes"], stage.get("peak_device_bytes")
        medians = [stage[key]["median"] if key in stage else None for key in _TIMED]
        rows.append(
            (
                name if name == "convert" else f"load {name}",
                stage["page_cache"],
                medians[0] if "seconds" not in stage else stage["seconds"],
                *medians[1:],
                None if peak is None else format_bytes(peak),
                None if device is None else format_bytes(device),
            )
        )
    head = ["stage", "page cache", "seconds", "of them weights", "tokens/s", "peak RSS", "peak device"]
    print(_report.table(head, rows))
    print(f"bound: RSS {format_bytes(result['rss_bound_bytes'])}, device {format_bytes(budget)}")
    checks = ("rss_within_bound", "device_within_budget", "outputs_equal")
    print(", ".join(f"{name.replace('_', ' ')}: {result[name]}" for name in checks))


if __name__ == "__main__":
    sys.exit(_report.run("large", main))
