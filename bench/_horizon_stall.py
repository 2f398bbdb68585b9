"""Part "stall" of `bench.horizon`: what steps wait for, over a grid of links and caches, on the virtual clock.

`ratio` is the link's bandwidth over the one that balances computing: K blocks of every layer in a layer's time.
`residency` is the share of the experts that have a slot, `stall` the time that steps wait for blocks, as a share of the
paper's baseline, which caches nothing and copies each expert that is needed when it is asked for. All fetch into a
cache with the same policy:

off: on demand only.
1, 2, 4, 8: candidates by value, from so many layers ahead at most; "threshold 1" and so on: those that are used more
  often than not, the nearest first. "threshold 1" is the pre-gate alone, as in the systems before ExpertFlow-S.
auto: the default. "auto, corrected": the same with a trained predictor, if one is given. "auto, knowing": with one
  that is always right.
clairvoyant: a schedule with the future in view, whatever the cache holds when (`stall_bound`), and a bound below all.

"of best" is the step time of auto over that of the best fixed horizon in hindsight, by either rule; "of off" over that
of off. A cell is marked spare where the link could carry what off fetches in 1/1.3 of the computing time.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench._graded import Graded
from bench._report import rounded, table
from ef_jax.errors import InputError
from ef_jax.predict import Oracle, Predictor
from ef_jax.progress import Progress
from ef_jax.replay.layer_steps import layer_steps
from ef_jax.replay.simulator import simulate
from ef_jax.replay.stall_bound import stall_bound
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.window_loads import window_loads
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Prefetch
from ef_jax.stats import PhaseStats

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
RESIDENCIES = (0.125, 0.25, 0.5, 0.75)
FIXED = (1, 2, 4, 8)
SPARE = 1.3
TARGETS = {"stall_where_spare": 0.001, "of_best": 1.10, "of_off": 1.01}
_LAYER_SECONDS = 1e-3
_BLOCK_BYTES = 1000


def run(
    trace: RoutingTrace,
    *,
    policy: str = "lru",
    ratios: Sequence[float] = RATIOS,
    residencies: Sequence[float] = RESIDENCIES,
    corrected: np.ndarray | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Replay `trace`, every token as a step of decoding; the first sequence only teaches.

    Its pre-gate scores predict, or, where it has none, predictions of a chosen quality (`bench._graded`); `corrected`
    are the bins of a trained predictor for all of it.
    """
    grid = _Grid(trace, policy, corrected)
    with Progress(len(ratios) * len(residencies), "cells", "replaying", enabled=None) as bar:
        rows = []
        for residency in residencies:
            for ratio in ratios:
                rows.append(grid.cell(residency, ratio))
                bar.update()
    result = {
        "policy": policy,
        "predictor": "graded" if trace.pregate is None else "pregate",
        "tokens": grid.tokens,
        **_summary(rows),
        "rows": rows,
    }
    _show(result)
    if picture is not None:
        _draw(rows, picture)
    return result


class _Grid:
    """Replays of one trace."""

    def __init__(self, trace: RoutingTrace, policy: str, corrected: np.ndarray | None) -> None:
        self._trace, self._policy, self._corrected = trace, policy, corrected
        self._counted = trace.select(1)
        self.tokens = self._counted.count
        self._steps, self._all = layer_steps(trace.select(0, 1), 1), layer_steps(trace, 1)
        self._fewest: dict[int, Any] = {}

    def cell(self, residency: float, ratio: float) -> dict[str, Any]:
        """Everybody's stalls and step times with one cache over one link."""
        trace = self._trace
        slots = round(residency * trace.layers * trace.num_experts)
        block = _LAYER_SECONDS / (trace.top_k * ratio)
        link = LinkModel(bandwidth=_BLOCK_BYTES / block)
        computing = self.tokens * trace.layers * _LAYER_SECONDS
        baseline = self.tokens * trace.layers * trace.top_k * block

        def replay(
            prefetch: Prefetch,
            candidates: str = "value",
            predictor: str | None = None,
            bins: np.ndarray | None = None,
        ) -> PhaseStats:
            return simulate(
                trace,
                slots=slots,
                policy=self._policy,
                batch=1,
                fit=1,
                block_bytes=_BLOCK_BYTES,
                link=link,
                compute_seconds=_LAYER_SECONDS,
                predictor=self._predictor(predictor)(),
                bins=bins,
                prefetch=prefetch,
                candidates=candidates,
            ).decode

        runs = {"off": replay("off", predictor="none")}
        for horizon in (horizon for horizon in FIXED if horizon <= trace.layers):
            runs[str(horizon)] = replay(horizon)
            runs[f"threshold {horizon}"] = replay(horizon, "threshold")
        runs["auto"] = replay("auto")
        if self._corrected is not None:
            runs["auto, corrected"] = replay("auto", bins=self._corrected)
        runs["auto, knowing"] = replay("auto", predictor="oracle")
        bound = self._bound(slots, block)
        seconds = {name: phase.seconds for name, phase in runs.items()}
        best = min((name for name in seconds if not name.startswith(("off", "auto"))), key=seconds.__getitem__)
        auto, off = runs["auto"], runs["off"]
        return {
            "residency": residency,
            "ratio": ratio,
            "spare": sum(off.misses) * block * SPARE <= computing,
            "stall": {name: rounded(phase.stall_seconds / baseline) for name, phase in runs.items()}
            | {"clairvoyant": rounded(bound[1] / baseline), "bound": rounded(bound[0] / baseline)},
            "step_time": {"on demand": rounded(1 + baseline / computing)}
            | {name: rounded(taken / computing) for name, taken in seconds.items()},
            "best_fixed": best,
            "of_best": rounded(seconds["auto"] / seconds[best]),
            "of_off": rounded(seconds["auto"] / seconds["off"]),
            "link_busy": rounded(auto.link_busy_seconds / auto.seconds),
            "blocks_a_layer": {
                "off": rounded(sum(off.misses) / self.tokens / trace.layers),
                "auto": rounded((auto.bytes_demand + auto.bytes_prefetch) / _BLOCK_BYTES / self.tokens / trace.layers),
                "auto, wasted": rounded(auto.bytes_wasted / _BLOCK_BYTES / self.tokens / trace.layers),
            },
        }

    def _predictor(self, name: str | None) -> Callable[[], str | Predictor]:
        trace = self._trace
        if name == "none":
            return lambda: "none"
        if name is None and trace.pregate is not None:
            return lambda: "pregate"
        kind = Graded if name is None else Oracle
        steps = (step.routes for step in trace.steps(1))
        return lambda: kind(steps, layers=trace.layers, experts=trace.num_experts)

    def _bound(self, slots: int, block: float) -> tuple[float, float]:
        """Stall of any schedule at least, and of one that knows the future."""
        places, first = slots + self._all.widest, len(self._steps)
        if places not in self._fewest:
            self._fewest[places] = window_loads(self._all, places, count_from=first)
        bound = stall_bound(
            self._all,
            slots,
            block_bytes=_BLOCK_BYTES,
            bandwidth=_BLOCK_BYTES / block,
            layer_seconds=_LAYER_SECONDS,
            staging=self._all.widest,
            count_from=first,
            fewest=self._fewest[places],
        )
        return bound.lower_seconds, bound.achievable_seconds


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spare = [row for row in rows if row["spare"]]
    least = TARGETS["stall_where_spare"]
    names = [name for name in rows[0]["stall"] if name.startswith("auto") or name == "clairvoyant"]
    return {
        "targets": TARGETS,
        "cells": len(rows),
        "worst_of_best": max(row["of_best"] for row in rows),
        "worst_of_off": max(row["of_off"] for row in rows),
        "spare_cells": len(spare),
        "spare_cells_within": {name: sum(row["stall"][name] <= least for row in spare) for name in names},
    }


def _show(result: dict[str, Any]) -> None:
    print(
        f"stall in % of on demand, {result['predictor']} predictions, {result['policy']} cache, {result['tokens']} "
        "tokens; * the link has 30 % to spare"
    )
    shown_names = ("off", "threshold 1", "threshold 4", "1", "4", "auto", "auto, knowing", "clairvoyant", "bound")
    names = [name for name in shown_names if name in result["rows"][0]["stall"]]
    if "auto, corrected" in result["rows"][0]["stall"]:
        names.insert(6, "auto, corrected")
    shown = [
        (
            f"{100 * row['residency']:g}",
            f"{row['ratio']:g}{'*' if row['spare'] else ' '}",
            *(f"{100 * row['stall'][name]:.3f}" for name in names),
            row["best_fixed"],
            f"{row['step_time']['off']:.4f}",
            f"{row['step_time']['auto']:.4f}",
            f"{row['of_best']:.4f}",
            f"{row['of_off']:.4f}",
        )
        for row in result["rows"]
    ]
    head = ["resident %", "x balance", *names, "best fixed", "step, off", "step, auto", "of best", "of off"]
    print(table(head, shown))
    within = result["spare_cells_within"]
    print(
        f"auto takes {result['worst_of_best']:.4f} of the best fixed horizon at worst, {result['worst_of_off']:.4f} of "
        f"off; of {result['spare_cells']} cells with 30 % to spare, {within['auto']} stall for at most 0.1 % of on "
        f"demand, {within['auto, knowing']} if the predictor is right\n"
    )


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('drawing needs matplotlib: pip install "ef_jax[plot]"') from None
    residencies = sorted({row["residency"] for row in rows})
    figure = Figure(figsize=(3.6 * len(residencies), 3.8), layout="constrained")
    axes = figure.subplots(1, len(residencies), sharey=True, squeeze=False)[0]
    lines = {
        "off": "k-",
        "threshold 1": "C1--",
        "threshold 4": "C1:",
        "1": "C0--",
        "4": "C0:",
        "auto": "C3-",
        "auto, corrected": "C4-",
        "auto, knowing": "C2-",
        "clairvoyant": "C7-.",
    }
    floor = 1e-5
    for axis, residency in zip(axes, residencies, strict=True):
        part = [row for row in rows if row["residency"] == residency]
        for name, style in lines.items():
            if name not in part[0]["stall"]:
                continue
            stalls = [max(row["stall"][name], floor) for row in part]
            axis.plot([row["ratio"] for row in part], stalls, style, label=name, linewidth=2 if name == "auto" else 1)
        spare = min((row["ratio"] for row in part if row["spare"]), default=math.inf)
        if spare < math.inf:
            axis.axvspan(spare, part[-1]["ratio"], color="C2", alpha=0.08)
        axis.axhline(TARGETS["stall_where_spare"], color="0.6", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="bandwidth over balance", title=f"{100 * residency:g} % resident")
    axes[0].set_ylabel("stall over that on demand")
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
