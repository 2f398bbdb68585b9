"""How fast are the grouped expert kernels, against other ways and against what the device can do?

    python -m bench.kernels [--shape olmoe] [--rows 1 64 1024] [--routing balanced] [--save]

Each line is the feed-forward network of M rows sorted by expert (silu, 16-bit weights) by one contender: every backend
of `grouped_ffn` that runs here, reading blocks in place from a pool; two `jax.lax.ragged_dot`; `dense_loop`, matmuls of
known sizes on arrays of their own, compiled for these very sizes; tokamax and torch where installed. Rows fall to
experts evenly, by Zipf's law, all to one, or evenly to every other one.

"GB/s" counts the weights of experts that have rows, once, and "of copy" is its share of the bytes a second that a copy
reads and writes on this device (weights that stay in a cache may beat it). "TFLOP/s" counts what the rows need, and "of
peak" is its share of a large matmul's. "x ragged" is how many times as fast as `jax.lax.ragged_dot`. Times are medians
over repeats in which contenders take turns, but for torch; off the CPU a sample is 20 calls inside one program. "error"
is the largest deviation from the first contender's result, relative to the largest result. Prints tables, then one line
of JSON.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bench import _kernel_torch, _report
from bench._kernel_cases import ROUTINGS, SHAPES, Case, ceilings, group_sizes, make_weights, parse_shape
from bench._kernel_contenders import Prepare, contenders
from bench._kernel_timing import Turn, in_a_row, spread_of_turns

TARGETS = {
    "cpu": {"x_ragged_dot_64_to_1024_rows": 4.0},
    "gpu": {
        "share_of_copy_decode": 0.85,
        "tflops_mixtral_8192": 650.0,
        "tflops_qwen3_131072": 420.0,
        "x_ragged_dot": 5.0,
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": ("bundled", "olmoe"), "rows": (1, 4, 16, 64, 256, 1024), "megabytes": 256, "matrix": 2048},
    "gpu": {
        "shapes": tuple(SHAPES)[1:],
        "rows": (1, 4, 16, 64, 512, 4096, 32768),
        "megabytes": 4096,
        "matrix": 8192,
    },
}


def main() -> int:
    """Run the bench; the exit code."""
    platform = jax.default_backend()
    defaults = _DEFAULTS["cpu" if platform == "cpu" else "gpu"]
    known = contenders()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", type=parse_shape, default=[SHAPES[name] for name in defaults["shapes"]])
    parser.add_argument("--rows", nargs="+", type=_report.positive, help="route-sorted rows")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["balanced"])
    parser.add_argument("--contender", nargs="+", choices=tuple(known), default=list(known))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=_report.positive, default=7)
    parser.add_argument("--seconds", type=float, default=30.0, help="a contender stops when its samples took as long")
    parser.add_argument("--copy-megabytes", type=_report.positive, default=defaults["megabytes"])
    parser.add_argument("--matrix", type=_report.positive, default=defaults["matrix"], help="of the matmul's peak")
    _report.add_save_option(parser, f"kernels_{platform}")
    options = parser.parse_args()
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(options.dtype))
    best = ceilings(dtype, options.copy_megabytes, options.matrix, options.repeats)
    print(
        f"copy {best['copy_bytes_per_second'] / 1e9:.4g} GB/s, {dtype} matmul of {options.matrix} "
        f"{best['matmul_operations_per_second'] / 1e12:.4g} TFLOP/s\n"
    )
    rows, refused = [], []
    for shape in options.shape:
        weights = make_weights(shape, dtype)
        for routing in options.routing:
            of_shape = []
            for count in options.rows or sorted({*defaults["rows"], *shape.rows}):
                case = Case(shape=shape, dtype=dtype, sizes=group_sizes(shape, count, routing), weights=weights)
                measured, reasons = _measure(case, {name: known[name] for name in options.contender}, options)
                about = {"shape": shape.name, "routing": routing, "rows": count}
                of_shape += [{**about, **_figures(name, case, measured, best)} for name in measured]
                refused += [{**about, "contender": name, "reason": reason} for name, reason in reasons.items()]
            _print(f"{shape.name} (D {shape.hidden}, F {shape.width}, E {shape.experts}), {routing}", of_shape)
            rows += of_shape
    for name, reason in {row["contender"]: row["reason"] for row in reversed(refused)}.items():
        print(f"{name} left out, first because: {reason}")
    result = {
        "devices": _report.devices(),
        "dtype": dtype.name,
        "targets": TARGETS["cpu" if platform == "cpu" else "gpu"],
        "ceilings": best,
        "shapes": {shape.name: _sizes(shape) for shape in options.shape},
        "rows": rows,
        "refused": refused,
    }
    _report.finish("kernels", result, options.save, ["torch", "tokamax"])
    return 0


def _measure(
    case: Case, prepares: Mapping[str, Prepare | None], options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Seconds and error of each contender that runs, and why the others do not."""
    turns: dict[str, Turn] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    first: np.ndarray | None = None
    for name, prepare in prepares.items():
        try:
            turn, result = _prepared(prepare, case)
            got = result()
        except NotImplementedError as error:
            refused[name] = str(error)
            continue
        except RuntimeError as error:  # out of memory, as jax and torch say it
            refused[name] = str(error).splitlines()[0][:200]
            continue
        first = got if first is None else first
        turns[name], errors[name] = turn, float(np.abs(got - first).max() / np.abs(first).max())
    # By itself and last: torch's threads spin for a while after a call, which slows what comes next on a CPU.
    alone = {name: turns.pop(name) for name in ("torch",) if name in turns}
    spreads = spread_of_turns(turns, options.repeats, options.seconds)
    spreads |= spread_of_turns(alone, options.repeats, options.seconds)
    return {name: {"seconds": spreads[name], "error": errors[name]} for name in spreads}, refused


def _prepared(prepare: Prepare | None, case: Case) -> tuple[Turn, Callable[[], np.ndarray]]:
    if prepare is None:
        return _kernel_torch.prepare(case)
    function, arguments = prepare(case)
    return in_a_row(function, arguments), lambda: np.asarray(jax.jit(function)(*arguments).astype(np.float32))


def _figures(
    name: str, case: Case, measured: Mapping[str, dict[str, Any]], best: Mapping[str, float]
) -> dict[str, Any]:
    seconds = measured[name]["seconds"]["median"]
    per_second, operations = case.active_bytes / seconds, case.operations / seconds
    ragged = measured.get("ragged_dot")
    return {
        "contender": name,
        "seconds": measured[name]["seconds"],
        "active_experts": int(np.count_nonzero(case.sizes)),
        "bytes_per_second": _report.rounded(per_second),
        "share_of_copy": _report.rounded(per_second / best["copy_bytes_per_second"]),
        "operations_per_second": _report.rounded(operations),
        "share_of_peak": _report.rounded(operations / best["matmul_operations_per_second"]),
        "x_ragged_dot": ragged and _report.rounded(ragged["seconds"]["median"] / seconds),
        "error": _report.rounded(measured[name]["error"]),
    }


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    print(title)
    head = ["contender", "rows", "ms", "min", "GB/s", "of copy", "TFLOP/s", "of peak", "x ragged", "error"]
    lines = [
        (
            row["contender"],
            row["rows"],
            row["seconds"]["median"] * 1e3,
            row["seconds"]["min"] * 1e3,
            row["bytes_per_second"] / 1e9,
            f"{row['share_of_copy']:.0%}",
            row["operations_per_second"] / 1e12,
            f"{row['share_of_peak']:.0%}",
            row["x_ragged_dot"],
            f"{row['error']:.0e}",
        )
        for row in rows
    ]
    print(_report.table(head, lines), end="\n\n")


def _sizes(shape: Any) -> dict[str, int]:
    return {"D": shape.hidden, "F": shape.width, "E": shape.experts, "K": shape.top_k}


if __name__ == "__main__":
    sys.exit(_report.run("kernels", main))
