"""Part "adaptation" of `bench.horizon`: bandwidth is cut to a quarter in mid-run and restored; does the horizon follow?

Three phases of equally many decode steps: at `ratio` times the bandwidth that balances computing (the K blocks of every
layer in its time), at a quarter of that, and at the first again. Of every phase but the first:

level: the mean horizon over the layers, in the last third of the phase.
follows: steps from the change until the mean horizon, over five steps, has gone 63 % of the way from the level of the
  phase before to that of this one (1 - 1/e, where time constants are read). None: never, or the levels are less than
  half a layer apart, so that there is nothing to follow.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ef_jax
from bench import _models, _report, _run
from bench._emulated import EmulatedModels
from bench._graded import Graded
from ef_jax.predict import Predictor
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.simulator import Replay, compute_seconds_per_layer, make_predictor
from ef_jax.replay.trace import RoutingTrace
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel

CUT = 0.25
WITHIN = 20
RATIOS = (0.5, 1.0, 2.0, 4.0)
RESIDENCIES = (0.125, 0.25, 0.5)
_DRAWN = 0.25  # the residency that is drawn, and decoded with
_PHASES = ("full", "cut", "restored")
_MEAN = 5
_GONE, _LEAST_WAY = 0.63, 0.5


def run(
    trace: RoutingTrace,
    steps: int = 100,
    picture: Path | None = None,
    *,
    predictor: str | None = None,
    wall: bool = True,
) -> dict[str, Any]:
    """The three phases in replays of `trace`, and in decoding with the bundled model over an emulated link.

    Args:
      trace: recorded routing of at least `3 x steps` tokens.
      steps: decode steps of each phase.
      picture: file to draw into.
      predictor: of the replays, a name of `simulator.PREDICTORS`; None: the trace's pre-gate scores, or, where it has
        none, predictions of a chosen quality (`bench._graded`).
      wall: decode, too.
    """
    replays = [
        replayed(trace, ratio=ratio, residency=residency, steps=steps, predictor=predictor)
        for residency in RESIDENCIES
        for ratio in RATIOS
    ]
    show(f"horizons of replays, a trace of {trace.model or 'an unknown model'}", replays)
    result: dict[str, Any] = {"cut": CUT, "within": WITHIN, "replay": replays}
    drawn = {"replay": [row for row in replays if row["residency"] == _DRAWN]}
    if wall:
        drawn["decoding"] = result["wall"] = decoded(steps)
        show("horizons while decoding with the bundled model", result["wall"])
    if picture is not None:
        plot(picture, drawn)
    return result


def decoded(steps: int) -> list[dict[str, Any]]:
    """The three phases by the clock on the wall: one long continuation a row."""
    lm = ef_jax.load(expert_fraction=1.0, context=1024, chunk=64, emulate_link="25GB/s", progress=False)
    models = EmulatedModels(lm)
    prompt = _models.prompts(lm, 1, 32)
    options = SamplingOptions(temperature=1.0, seed=1)
    layers = len(lm.spec.moe_layers)
    lm = models.make(_DRAWN, LinkModel(bandwidth=1e15), prefetch=1)
    _decode(lm, prompt, options, steps, {})
    layer_seconds = compute_seconds_per_layer(lm.stats)
    rows = []
    for ratio in RATIOS:
        full = LinkModel(bandwidth=ratio * lm.spec.experts.top_k * lm.spec.block_bytes / layer_seconds)
        cut = dataclasses.replace(full, bandwidth=CUT * full.bandwidth)
        lm = models.make(_DRAWN, full)
        horizons, waits = _decode(lm, prompt, options, 3 * steps, {steps: cut, 2 * steps: full})
        rows.append({"ratio": ratio, "residency": _DRAWN, **summary(horizons, waits, layer_seconds * layers)})
    return rows


def _decode(
    lm: LanguageModel,
    prompt: list[np.ndarray],
    options: SamplingOptions,
    steps: int,
    changes: dict[int, LinkModel],
) -> tuple[list[float], list[float]]:
    """Horizon and stall seconds by step; the link changes before some of them."""
    engine = lm._engine
    _run.start(engine, prompt, options, len(prompt[0]) + steps + 1)
    waits = []
    for step in range(steps):
        if step in changes:
            engine.link.set_model(changes[step])
        stalled = engine.stats.decode.stall_seconds
        engine.step([0])
        waits.append(engine.stats.decode.stall_seconds - stalled)
    _run.stop(engine, 1)
    return engine.stats.horizon["mean_by_step"][-steps:], waits


def replayed(
    trace: RoutingTrace,
    *,
    ratio: float,
    residency: float,
    steps: int,
    predictor: str | None = None,
    block_bytes: int | None = None,
    layer_seconds: float = 1e-3,
) -> dict[str, Any]:
    """The three phases, `steps` steps each, on the virtual clock; sequences of the trace run one after another."""
    block_bytes = block_bytes or trace.block_bytes or 1_000_000
    full = LinkModel(bandwidth=ratio * trace.top_k * block_bytes / layer_seconds)
    cut = LinkModel(bandwidth=CUT * full.bandwidth)
    made: Predictor | None
    said = None
    if predictor is None and trace.pregate is None:
        made = Graded((step.routes for step in trace.steps(1)), layers=trace.layers, experts=trace.num_experts)
    else:
        said = PregateBins(trace) if predictor in (None, "pregate") else None
        distances = 0 if said is None else said.distances
        made = make_predictor(predictor or "pregate", [trace], batch=1, distances=distances)
    replay = Replay(
        layers=trace.layers,
        experts=trace.num_experts,
        slots=round(residency * trace.layers * trace.num_experts),
        staging_slots=trace.top_k,
        policy="lru",
        block_bytes=block_bytes,
        link=full,
        compute_seconds=layer_seconds,
        predictor=made,
        prefetch="auto",
    )
    waits = []
    passes = itertools.islice(trace.steps(1), 3 * steps)
    for number, step in enumerate(passes):
        if number in (steps, 2 * steps):
            replay._link.set_model(cut if number == steps else full)
        stalled = replay.stats.decode.stall_seconds
        replay.run(step, None if said is None else said.of_step(step.rows))
        waits.append(replay.stats.decode.stall_seconds - stalled)
    replay.end_run()
    horizons = replay.stats.horizon["mean_by_step"][-len(waits) :]
    return {"ratio": ratio, "residency": residency, **summary(horizons, waits, layer_seconds * trace.layers)}


def summary(horizons: Sequence[float], waits: Sequence[float], computing: float) -> dict[str, Any]:
    """Levels, and how soon they are reached, of a run of three phases.

    Args:
      horizons: mean horizon over the layers, by step.
      waits: stall seconds, by step.
      computing: seconds that a step takes without stalls.
    """
    steps = len(horizons) // len(_PHASES)
    parts = [np.asarray(horizons[first : first + steps]) for first in range(0, 3 * steps, steps)]
    levels = [float(part[-(steps // 3) :].mean()) for part in parts]
    return {
        "steps": steps,
        "levels": dict(zip(_PHASES, map(_report.rounded, levels), strict=True)),
        "follows": {
            name: _follows(part, before, after)
            for name, part, before, after in zip(_PHASES[1:], parts[1:], levels, levels[1:], strict=False)
        },
        "horizon": [_report.rounded(value) for value in horizons],
        "stall_share": [_report.rounded(wait / (wait + computing)) for wait in waits],
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of runs."""
    print(title)
    head = ["x balance", "resident %", *(f"level {name}" for name in _PHASES), "after the cut", "after restoring"]
    cells = [
        (
            f"{row['ratio']:g}",
            f"{100 * row['residency']:g}",
            *(f"{row['levels'][name]:.2f}" for name in _PHASES),
            *(row["follows"][name] for name in _PHASES[1:]),
        )
        for row in rows
    ]
    print(_report.table(head, cells), end="\n\n")


def plot(path: Path, rows: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Draw horizon and stall by step: a row of panels a kind of run, a column a bandwidth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(runs) for runs in rows.values())
    figure = Figure(figsize=(4.6 * columns, 3.4 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Bandwidth cut to a quarter and restored (grey: cut); {100 * _DRAWN:g} % of the experts have a slot"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True)
    for panels, (kind, runs) in zip(grid, rows.items(), strict=True):
        for axes, run in zip(panels, runs, strict=True):
            axes.set_title(f"{kind}, {run['ratio']:g} x balance")
            other = axes.twinx()
            other.axvspan(run["steps"], 2 * run["steps"], color="#D9D9D9", zorder=0)
            other.plot([100 * share for share in run["stall_share"]], color="#E69F00", linewidth=0.6)
            other.set_ylim(0, 100)
            axes.plot(run["horizon"], color="#0072B2", linewidth=1.6)
            axes.set_ylim(bottom=0)
            axes.set_zorder(other.get_zorder() + 1)
            axes.patch.set_visible(False)
        panels[0].set_ylabel("horizon, mean of the layers (blue)")
        other.set_ylabel("stall, % of the step (orange)")
    for axes in grid[-1]:
        axes.set_xlabel("decode step")
    figure.savefig(path)


def _follows(part: np.ndarray, before: float, after: float) -> int | None:
    """Steps until most of the way from level to level is gone."""
    way = after - before
    if abs(way) < _LEAST_WAY:
        return None
    smooth = np.convolve(part, np.full(_MEAN, 1 / _MEAN), mode="valid")
    reached = np.flatnonzero((smooth - before) / way >= _GONE)
    return int(reached[0]) + (_MEAN + 1) // 2 if reached.size else None
