"""Part "runs" of `bench.forecast`: against runs made now, over emulated links.

Prompts are the bundled model's held-out texts, or random ids for a made-up model; tokens are sampled. Every repeat
begins with an empty cache; the fastest counts, as it does where the figures are measured. Nothing is prefetched: on a
CPU copies take the cores that compute, and a forecast for one has no overlap.
"""

import argparse
import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ef_jax
from bench import _forecast_rows, _models
from bench._emulated import EmulatedModels
from bench._report import rounded
from ef_jax.doctor import measure_machine
from ef_jax.forecast import Machine, find_machine, forecast
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.replay.trace import RoutingTrace
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel

_PCIE = {"PCIe 3.0": 12.6e9, "PCIe 4.0": 25.2e9}  # usable, of `MACHINES`
_SCALED_BY = 9437184  # bytes of a block of Qwen3-30B-A3B
_FREE = LinkModel(bandwidth=1e12)
_PROMPT_TOKENS = 32


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows and their summaries."""
    dispatch_inline()
    machine = _machine(options)
    rows = []
    with contextlib.ExitStack() as stack:
        for name in options.models:
            path = None
            if name == "synthetic":
                shape = _models.parse_shape(options.shape)
                path = stack.enter_context(_models.synthetic_directory(shape, options.scratch))
            for batch in options.batches:
                rows += _of_model(name, path, batch, machine, options)
                gc.collect()
    _forecast_rows.show(rows)
    found = {"prior": _forecast_rows.summary(rows), "trace": _forecast_rows.summary(rows, "ratio_by_trace")}
    for name, summary in found.items():
        _forecast_rows.say(f"hit rate by {name}", summary)
    return {"machine": machine.as_dict(), "shape": options.shape, "rows": rows, **found}


def _machine(options: argparse.Namespace) -> Machine:
    if options.machine is not None:
        return find_machine(options.machine)
    directory = Path.cwd() if options.scratch is None else options.scratch
    return measure_machine(jax.devices()[0], directory).machine


def _of_model(
    name: str, path: Path | None, batch: int, machine: Machine, options: argparse.Namespace
) -> list[dict[str, Any]]:
    context = _PROMPT_TOKENS + options.tokens + 1
    lm = ef_jax.load(
        path, expert_fraction=1.0, batch=batch, context=context, chunk=_PROMPT_TOKENS, emulate_link=_FREE,
        progress=False,
    )  # fmt: skip
    models = EmulatedModels(lm)
    prompts = _models.prompts(lm, batch, _PROMPT_TOKENS)
    sampling = SamplingOptions(max_new_tokens=options.tokens + 1, temperature=0.8, top_p=0.9, ignore_eos=True)
    with lm.trace() as recording:
        lm.generate(prompts, sampling)
    trace = recording.trace()
    scale = lm.spec.block_bytes / _SCALED_BY
    links = {link: LinkModel(bandwidth=rate * scale, latency=10e-6) for link, rate in _PCIE.items()}
    cells: dict[tuple[str, float], LanguageModel] = {
        (link, fraction): models.make(fraction, model, prefetch="off", predictor=None)
        for link, model in {**links, "no bound": _FREE}.items()
        for fraction in options.fractions
    }
    best = dict.fromkeys(cells, 0.0)
    for repeat in range(options.repeats + 1):
        for key, cell in cells.items():
            rate = _rate(cell, prompts, sampling)
            if repeat:  # the first compiles
                best[key] = max(best[key], rate)
    return [
        _row(f"{name}, {link}, {100 * fraction:g} %", cells[link, fraction], rate, machine, trace)
        for (link, fraction), rate in best.items()
    ]


def _rate(lm: LanguageModel, prompts: list[np.ndarray], sampling: SamplingOptions) -> float:
    lm._engine.residency.clear()
    lm.stats.reset()
    lm.generate(prompts, sampling)
    return lm.stats.tokens_per_second


def _row(name: str, lm: LanguageModel, measured: float, machine: Machine, trace: RoutingTrace) -> dict[str, Any]:
    there = machine.with_link(lm._engine.link.model)
    # What runs has a pool as large as all experts, so that nothing compiles twice: only its slots matter here.
    plan = dataclasses.replace(lm.plan, context=2 * (_PROMPT_TOKENS + lm.plan.context) // 2)
    prior, replayed = forecast(lm.spec, plan, there), forecast(lm.spec, plan, there, trace=trace)
    phase = lm.stats.decode
    hits = sum(phase.hits) / (sum(phase.hits) + sum(phase.misses))
    rates = prior.batched.hit_rate, replayed.batched.hit_rate
    return _forecast_rows.row(
        name, measured, prior.batched, replayed.batched,
        hits=rounded(hits), hits_forecast=[rounded(rate.expected) for rate in rates if rate is not None],
    )  # fmt: skip
