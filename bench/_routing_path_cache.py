"""Part "cache" of `bench.routing_path`: hits, wasted bytes and stalls that predictions make of a cache, in replays.

The reported sequences run side by side, every token as a step of decoding; the first only teaches. The fewer run side
by side, the fewer of them are taken; steps at the end, where they run out, count too. An expert that a layer waits for
is no hit, also if it was under way.

The link is balanced: in the time that a layer computes it carries as many blocks as a layer of a full batch uses
distinct experts on average (K of them for one sequence, as in `bench.horizon`). So with perfect foresight it could
just carry everything that is used, with nothing cached; what is wasted has to be made up for by the cache.

lru, lfu, next_use: on demand only. belady: the most hits that any rule can have without prefetching, if
  what it does not keep passes through staging.
plec + path: as the paper has it. Where the path predictor names experts of coming layers, nearest first, they are
  fetched into the slots that `plec` gives up.
path, pregate, fusion: candidates by value, from paths, pre-gate scores or both, at most `MOST_WASTED` of the bytes
  moved wasted; "unbounded" without such a bound. A trace without pre-gate scores has the path alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench._report import rounded, table
from bench._routing_path_data import Fitted, Options, on_bundled, on_trace
from ef_jax.errors import InputError
from ef_jax.predict import Paths, Predictor
from ef_jax.progress import Progress
from ef_jax.replay.replays import Replays, SweepSettings, Task
from ef_jax.replay.simulator import simulate
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.trace_file import load_trace
from ef_jax.schedule.link_model import LinkModel
from ef_jax.stats import PhaseStats

BATCHES = {1: 12, 4: 24, 16: 60}
"""Sequences that are taken at most, by batch."""

RESIDENCIES = (0.125, 0.25, 0.5)
MOST_WASTED = 0.25
TARGETS = {"points_over_lru": 15.0, "wasted": 0.3, "at": {"residency": 0.25, "batches": [4, 16]}}
_POLICY = "lru"  # of the arms by value
_LAYER_SECONDS = 1e-3
_BLOCK_BYTES = 1000


class _Data(NamedTuple):
    """Sequences to replay, and the path bins of their tokens."""

    trace: RoutingTrace
    paths: np.ndarray


class _Arm(NamedTuple):
    """One way to run a cache; the settings are those of `simulate`."""

    name: str
    settings: dict[str, Any]
    predictor: Callable[[], Predictor] | None = None


def run(options: Options) -> dict[str, Any]:
    """The part's tables, and its figures as JSON."""
    residencies = tuple(options.residency or RESIDENCIES)
    if options.paths is not None:
        if options.trace is None:
            raise InputError("predicted paths are of a trace: give --trace, too")
        trace, bins = load_trace(options.trace), np.load(options.paths, mmap_mode="r", allow_pickle=False)
        first = trace.sequences - options.report
        data = _Data(trace.select(first), np.asarray(bins[trace.offsets[first] :]))
        return {"targets": TARGETS, "trace": measure(data, residencies=residencies)}
    fitted = {"bundled": on_bundled(options)}
    if options.trace is not None:
        fitted = {"trace": on_trace(options), **fitted}
    measured = {name: measure(_data(each), residencies=residencies) for name, each in fitted.items()}
    return {"targets": TARGETS, **measured}


def _data(fitted: Fitted) -> _Data:
    return _Data(fitted.reported, fitted.bins)


def measure(
    data: _Data, batches: dict[int, int] = BATCHES, residencies: tuple[float, ...] = RESIDENCIES
) -> dict[str, Any]:
    """Every arm at every residency and batch size; prints a table."""
    rows: list[dict[str, Any]] = []
    batches = {batch: count for batch, count in batches.items() if batch < data.trace.sequences}
    with Progress(len(batches) * len(residencies), "cells", "replaying", enabled=None) as bar:
        for batch, sequences in batches.items():
            part = data.trace.select(0, min(sequences, data.trace.sequences))
            taken = _Data(part, data.paths[: part.count])
            for residency in residencies:
                rows += _cell(taken, batch, residency)
                bar.update()
    _show(data.trace, rows)
    return {"sequences": data.trace.sequences, "pregate": data.trace.pregate is not None, "rows": rows}


def _cell(data: _Data, batch: int, residency: float) -> list[dict[str, Any]]:
    trace = data.trace
    slots = round(residency * trace.layers * trace.num_experts)
    width = distinct(trace, batch)
    block_seconds = _LAYER_SECONDS / width
    common = {"batch": batch, "residency": residency, "slots": slots, "experts_a_layer": rounded(width)}
    rows = []
    for arm in _arms(data):
        phase = simulate(
            trace,
            slots=slots,
            batch=batch,
            fit=1,
            block_bytes=_BLOCK_BYTES,
            link=LinkModel(bandwidth=_BLOCK_BYTES / block_seconds),
            compute_seconds=_LAYER_SECONDS,
            **({} if arm.predictor is None else {"predictor": arm.predictor()}),
            **arm.settings,
        ).decode
        rows.append(common | {"arm": arm.name, **_figures(phase, trace.layers)})
    best = Replays(trace, SweepSettings(batch=batch, fit=1)).run(Task("belady_bypass", slots, None)).phase
    best.stall_seconds = sum(best.misses) * block_seconds
    best.bytes_demand = sum(best.misses) * _BLOCK_BYTES
    rows.append(common | {"arm": "belady", **_figures(best, trace.layers)})
    lru = next(row["hits"] for row in rows if row["arm"] == "lru")
    for row in rows:
        row["points_over_lru"] = rounded(100 * (row["hits"] - lru))
    return rows


def _arms(data: _Data) -> list[_Arm]:
    trace = data.trace
    shape = {"layers": trace.layers, "experts": trace.num_experts, "top_k": trace.top_k}
    distances = 0 if trace.pregate is None else trace.pregate.shape[2]
    by_value = {"policy": _POLICY, "prefetch": "auto", "most_wasted": MOST_WASTED}
    paths = {"paths": data.paths}

    def path() -> Predictor:
        return Paths(**shape)

    arms = [_Arm(policy, {"policy": policy}) for policy in ("lru", "lfu", "next_use")]
    paper = {"policy": "plec", "prefetch": trace.layers, "candidates": "top_k"}
    arms += [_Arm("plec + path", paper | paths, path), _Arm("path", by_value | paths, path)]
    if not distances:
        return [*arms, _Arm("path, unbounded", by_value | paths | {"most_wasted": 1.0}, path)]
    gate = {"predictor": "pregate"}
    return [
        *arms,
        _Arm("pregate", by_value | gate),
        _Arm("fusion", by_value | gate | paths),
        _Arm("fusion, unbounded", by_value | gate | paths | {"most_wasted": 1.0}),
    ]


def distinct(trace: RoutingTrace, batch: int) -> float:
    """Distinct experts that a layer of a full batch uses, on average over the steps; of all steps, if none is full."""
    steps = list(trace.steps(batch))
    full = [step for step in steps if len(step.rows) == batch] or steps
    counts = [len({expert for row in rows for expert in row}) for step in full for rows in step.routes]
    return float(np.mean(counts))


def _figures(phase: PhaseStats, layers: int) -> dict[str, float]:
    uses = sum(phase.hits) + sum(phase.late_hits) + sum(phase.misses)
    moved = phase.bytes_demand + phase.bytes_prefetch
    return {
        "hits": rounded(sum(phase.hits) / uses),
        "late": rounded(sum(phase.late_hits) / uses),
        "wasted": rounded(phase.bytes_wasted / max(moved, 1)),
        "blocks_a_layer": rounded(moved / _BLOCK_BYTES / (phase.steps * layers)),
        "stall": rounded(phase.stall_seconds / (phase.steps * layers * _LAYER_SECONDS)),
    }


def _show(trace: RoutingTrace, rows: list[dict[str, Any]]) -> None:
    print(f"{trace.model or 'trace'}: caches over a balanced link; stall over the time that layers compute")
    shown = [
        (
            row["arm"],
            row["batch"],
            f"{100 * row['residency']:g}",
            f"{100 * row['hits']:.2f}",
            f"{row['points_over_lru']:+.2f}",
            f"{100 * row['late']:.2f}",
            f"{100 * row['wasted']:.1f}",
            f"{row['blocks_a_layer']:.2f}",
            f"{row['stall']:.4f}",
        )
        for row in rows
    ]
    head = ["arm", "batch", "resident %", "hit %", "over lru", "late %", "wasted %", "blocks/layer", "stall"]
    print(table(head, shown), end="\n\n")
