"""How fast do a checkpoint's weights come into memory: the Hugging Face original against its conversion?

    python -m bench.loading ORIGINAL CONVERTED [--threads 4] [--repeats 3]

Reads every dense array and every expert block into memory that is reused, so that only reading is timed. The files
should fit in the page cache; one untimed pass warms it, and formats take turns. Prints a table, then one line of JSON.
"""

import argparse
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np

from bench import _report
from ef_jax.weights import Checkpoint, open_checkpoint


def main() -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", help="Hugging Face checkpoint directory")
    parser.add_argument("converted", help="the same checkpoint, converted")
    parser.add_argument("--threads", type=_report.positive, default=4)
    parser.add_argument("--repeats", type=_report.positive, default=3)
    _report.add_save_option(parser, "loading")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"original": [], "converted": []}
    size = 0
    for repeat in range(options.repeats + 1):
        for name, times in seconds.items():
            start = time.perf_counter()
            with open_checkpoint(getattr(options, name)) as checkpoint:
                read_all(checkpoint, options.threads)
            if repeat:
                times.append(time.perf_counter() - start)
            size = checkpoint.nbytes
    rates = {name: _report.spread([size / time_ / 1e9 for time_ in times]) for name, times in seconds.items()}
    head = ("format", "GB/s", "min", "max")
    print(_report.table(head, [(name, rate["median"], rate["min"], rate["max"]) for name, rate in rates.items()]))
    summary = {
        "bytes": size,
        "threads": options.threads,
        "gb_per_second": rates,
        "speedup": _report.rounded(rates["converted"]["median"] / rates["original"]["median"]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _report.finish("loading", summary, options.save)
    return 0


def read_all(checkpoint: Checkpoint, threads: int) -> None:
    """Read all of a checkpoint's weights, experts with several threads."""
    spec = checkpoint.spec
    for _ in checkpoint.dense():
        pass
    blocks = np.empty((threads, *spec.block_format.shape), spec.block_format.dtype)

    def read(thread: int) -> None:
        keys = list(product(spec.moe_layers, range(spec.experts.count)))
        for layer, expert in keys[thread::threads]:
            checkpoint.read_block(layer, expert, blocks[thread])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


if __name__ == "__main__":
    sys.exit(_report.run("loading", main))
