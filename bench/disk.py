"""Does a model that is larger than host memory run from disk, within its memory, at the rate of the disk?

    python -m bench.disk [--gigabytes 30] [--host-memory 4GiB] [--budget 1GB] [--scratch DIR] [--keep] [--save]

Makes up a converted qwen3_moe checkpoint (no tokenizer) straight in its layout, and generates from token ids with a
bounded host pool, each run in a process of its own (`bench._disk_stage`): reading only what a layer asks for
("demand"), reading ahead ("ahead"), and that with every block's checksum compared at every read ("checksums"). Where
the experts fit in half of the memory that is available, a run with all of them in host memory comes last ("memory").

Bounds: the peak RSS of a run is at most what the process had before anything of the model was in memory, plus device
bytes (a CPU's device memory is part of it) and host bytes of its plan, plus 5 %; tokens and log-probabilities of all
runs are equal; with nothing else to do, the reading threads read blocks at 70 % or more of the rate of `dd`, which
reads a file of 2 GB in the same directory with O_DIRECT, 4 MB a call. The median of three turns counts. That rate is
also given with checksums, and for each run over the time in which a read was under way, when the cores also compute.
Prints a table, then one line of JSON; exit code 1 if a bound is not shown to hold.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from bench import _models, _report
from bench._synthetic_converted import write_converted
from bench.make_synthetic import Synthetic
from ef_jax.memory.host_plan import THREADS, available_memory
from ef_jax.memory.read_buffers import ReadBuffers
from ef_jax.memory.sizes import format_bytes, parse_bytes
from ef_jax.weights import open_checkpoint
from ef_jax.weights.block_reader import BlockReader, Checksums

SHAPE = Synthetic(hidden=1024, width=768, experts=128, top_k=8)
_RUNS: dict[str, dict[str, Any]] = {
    "demand": {"predictor": "none", "prefetch": "off"},
    "ahead": {},
    "checksums": {"disk_checksums": "always"},
}
_RSS_FACTOR, _RATE_FACTOR = 1.05, 0.7
_TURNS = 3
_PROBE_BYTES, _PROBE_CALL = 2 * 10**9, 4 << 20


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=30.0, help="of the checkpoint, about (default: 30)")
    parser.add_argument("--host-memory", type=parse_bytes, default="4GiB", help="for experts")
    parser.add_argument("--budget", type=parse_bytes, default="1GB", help="device memory")
    parser.add_argument("--tokens", type=_report.positive, default=32)
    parser.add_argument("--scratch", type=Path, help="directory for the checkpoint")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    _report.add_save_option(parser, "disk")
    options = parser.parse_args()
    shape = SHAPE.of_bytes(int(options.gigabytes * 1e9))
    work = Path(tempfile.mkdtemp(prefix="disk-", dir=options.scratch))
    try:
        _models.require_disk(work, shape.nbytes + _PROBE_BYTES)
        result = measure(work, shape, options)
    finally:
        if options.keep:
            print(f"kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    _report.finish("disk", result, options.save)
    return 0 if result["within_bounds"] else 1


def measure(work: Path, shape: Synthetic, options: argparse.Namespace) -> dict[str, Any]:
    """Make a checkpoint in `work` and run it; prints the table, returns the JSON's own part."""
    model = work / "model"
    began = time.perf_counter()
    write_converted(model, shape)
    make_seconds = time.perf_counter() - began
    probe = work / "probe"
    _write_probe(probe)
    turns: dict[str, list[float]] = {"dd": [], "blocks": [], "blocks, checksums": []}
    for _ in range(_TURNS):
        turns["dd"].append(_dd(probe))
        turns["blocks"].append(read_rate(model, "never", _PROBE_BYTES))
        turns["blocks, checksums"].append(read_rate(model, "always", _PROBE_BYTES))
    rates = {name: _report.spread(values) for name, values in turns.items()}
    runs = {name: {**run, "host_memory": options.host_memory} for name, run in _RUNS.items()}
    room = available_memory()
    if room is not None and shape.nbytes < room / 2:
        runs["memory"] = {}
    stages = {name: _stage(model, options, run) for name, run in runs.items()}
    outputs = [(stage.pop("tokens"), stage.pop("logprobs")) for stage in stages.values()]
    paged = [stage for stage in stages.values() if "disk" in stage]
    for stage in paged:
        planned = stage["planned_device_bytes"] + stage["planned_host_bytes"]
        stage["rss_bound_bytes"] = int(_RSS_FACTOR * (stage["base_rss_bytes"] + planned))
    checks = {
        "rss_within_bound": all(stage["peak_rss_bytes"] <= stage["rss_bound_bytes"] for stage in paged),
        "reads_at_rate": rates["blocks"]["median"] >= _RATE_FACTOR * rates["dd"]["median"],
        "outputs_equal": all(output == outputs[0] for output in outputs),
    }
    result = {
        "checkpoint_bytes": shape.nbytes,
        "layers": shape.layers,
        "block_bytes": shape.spec.block_bytes,
        "host_memory": options.host_memory,
        "budget_bytes": options.budget,
        "make_seconds": _report.rounded(make_seconds),
        "rates": rates,
        "stages": stages,
        **checks,
        "within_bounds": all(checks.values()),
    }
    _print(result)
    return result


def _stage(model: Path, options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """One run, in a process of its own."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    words = [str(model), str(options.budget), str(options.tokens), json.dumps(run)]
    command = [sys.executable, "-m", "bench._disk_stage", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"a run with {run} ended with exit code {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def read_rate(model: Path, checksums: Checksums, nbytes: int) -> float:
    """Bytes a second of reading blocks as a host pool does, from the start of a checkpoint, `nbytes` at most."""
    with open_checkpoint(model) as checkpoint:
        spec = checkpoint.spec
        reader = BlockReader(checkpoint, checksums=checksums)
        buffers = ReadBuffers(THREADS, reader.buffer_bytes)
        keys = list(product(spec.moe_layers, range(spec.experts.count)))[: nbytes // spec.block_bytes]

        def read(key: tuple[int, int]) -> None:
            reader.read(*key, buffers.take())

        with ThreadPoolExecutor(THREADS) as pool:
            began = time.perf_counter()
            list(pool.map(read, keys))
            return len(keys) * spec.block_bytes / (time.perf_counter() - began)


def _write_probe(path: Path) -> None:
    """A file of bytes that no disk takes for a hole."""
    part = os.urandom(_PROBE_CALL)
    with open(path, "wb", buffering=0) as file:
        for _ in range(_PROBE_BYTES // _PROBE_CALL):
            file.write(part)
        os.fsync(file.fileno())


def _dd(path: Path) -> float:
    """Bytes a second of reading a file past the page cache with `dd`."""
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={_PROBE_CALL}", "iflag=direct"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, env=os.environ | {"LC_ALL": "C"})
    found = re.search(r"(\d+) bytes.* copied, ([0-9.e+-]+) s", done.stderr)
    if found is None:
        raise OSError(f"dd says what nobody understands: {done.stderr!r:.200}")
    return int(found[1]) / float(found[2])


def _print(result: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate['median'] / 1e9:.3g}" for name, rate in result["rates"].items())
    print(
        f"{format_bytes(result['checkpoint_bytes'])} in {result['layers']} layers, blocks of "
        f"{format_bytes(result['block_bytes'])}, host memory {format_bytes(result['host_memory'])}, device "
        f"{format_bytes(result['budget_bytes'])}; GB/s: {rates}"
    )
    rows = []
    for name, stage in result["stages"].items():
        disk = stage.get("disk", {})
        asked = sum(disk.get(kind, 0) for kind in ("hits", "late_hits", "misses"))
        rows.append(
            (
                name,
                stage["prefill_seconds"],
                stage["tokens_per_second"],
                100 * disk["hits"] / asked if asked else None,
                format_bytes(disk["bytes_read"] + disk["bytes_ahead"]) if disk else None,
                disk["read_rate"] / 1e9 if disk else None,
                format_bytes(stage["peak_rss_bytes"]),
                format_bytes(stage["rss_bound_bytes"]) if disk else None,
            )
        )
    head = ["run", "prompt s", "tokens/s", "there %", "read", "GB/s", "peak RSS", "bound"]
    print(_report.table(head, rows))
    checks = ("rss_within_bound", "reads_at_rate", "outputs_equal")
    print(", ".join(f"{name.replace('_', ' ')}: {result[name]}" for name in checks))


if __name__ == "__main__":
    sys.exit(_report.run("disk", main))
