"""Part "wall" of `bench.horizon`: decoding by the clock on the wall, over emulated links, with and without prefetching.

`ratio` is the link's bandwidth over that which balances computing: K blocks of every layer in a layer's time, as
measured with a link that costs next to nothing. Every row begins with an empty cache and a predictor that knows
nothing; rows take turns. "off" has programs that do not look ahead. "replayed" is what a replay of the same routing
comes to over the same link, with the layer time that the row itself had without its stalls.

Copies are made by the cores that compute, so every block that is fetched costs compute time here, early or late: what
these rows show is that prefetching hides the link, not that it is free.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ef_jax
from bench import _models
from bench._emulated import EmulatedModels
from bench._report import rounded, table
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.predictor_file import load_predictor
from ef_jax.replay.simulator import compute_seconds_per_layer, simulate
from ef_jax.replay.trace import RoutingTrace
from ef_jax.runtime.look_ahead import LookAheadSpec
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel

RATIOS = (0.5, 2.0, 8.0)
RESIDENCIES = (0.125, 0.25, 0.5)
MODES: tuple[int | str, ...] = ("off", 1, 2, 4, "auto")
_LATENCY = 20e-6
_NO_LINK = LinkModel(bandwidth=1e15)
_PROMPTS, _PROMPT_TOKENS = 3, 32


@dataclasses.dataclass
class _Row:
    """One mode over one link with one cache, and what it has measured so far."""

    mode: int | str
    corrected: bool
    ratio: float
    residency: float
    link: LinkModel
    seconds: list[float] = dataclasses.field(default_factory=list)
    stalls: list[float] = dataclasses.field(default_factory=list)
    replayed: list[float] = dataclasses.field(default_factory=list)
    equal: bool = True

    @property
    def name(self) -> str:
        return f"{self.mode}, corrected" if self.corrected else str(self.mode)


def run(
    repeats: int, tokens: int = 64, trained: Path | None = None, ratios: Sequence[float] = RATIOS
) -> dict[str, Any]:
    """Median milliseconds a token of the bundled model, batch 1, by link, cache and mode.

    Args:
      repeats: of every row.
      tokens: to decode after each prompt.
      trained: a predictor of `ef-jax train-predictor`, for another row of mode "auto".
      ratios: bandwidths.
    """
    lm = ef_jax.load(expert_fraction=1.0, context=128, chunk=64, emulate_link="25GB/s", progress=False)
    models = {False: EmulatedModels(lm)}
    if trained is not None:
        correction, _ = load_predictor(trained, lm.spec, model_fingerprint(lm.spec, lm._engine.dense.routers(lm.spec)))
        look = LookAheadSpec(distances=correction.spec.distances, correction=correction.spec)
        models[True] = EmulatedModels(lm, look, correction)
    prompts = _models.prompts(lm, _PROMPTS, _PROMPT_TOKENS)
    sampling = SamplingOptions(max_new_tokens=tokens + 1, temperature=0.8, top_p=0.9, ignore_eos=True)
    with lm.trace(pregate=models[False].look.distances) as recording:
        expected = [result.tokens for result in lm.generate(prompts, sampling)]
    trace = recording.trace()
    layer_seconds = _layer_seconds(models[False], prompts, sampling)
    balance = lm.spec.experts.top_k * lm.spec.block_bytes / layer_seconds
    rows = [
        _Row(mode, corrected, ratio, residency, LinkModel(bandwidth=ratio * balance, latency=_LATENCY))
        for ratio in ratios
        for residency in RESIDENCIES
        for mode, corrected in [*((mode, False) for mode in MODES), *([("auto", True)] if trained else [])]
    ]
    for _ in range(repeats):
        for row in rows:
            _measure(row, models[row.corrected], prompts, sampling, expected, trace)
    result = [_figures(row) for row in rows]
    _show(result, layer_seconds)
    return {
        "layer_seconds": rounded(layer_seconds),
        "balanced_bandwidth": rounded(balance),
        "latency": _LATENCY,
        "prompts": _PROMPTS,
        "tokens": tokens,
        "repeats": repeats,
        "tokens_equal": all(row.equal for row in rows),
        "rows": result,
    }


def _layer_seconds(models: EmulatedModels, prompts: list[np.ndarray], sampling: SamplingOptions) -> float:
    """What a layer takes where nothing is waited for; the first run compiles."""
    for _ in range(2):
        lm = models.make(0.5, _NO_LINK, prefetch="off", predictor=None)
        lm.generate(prompts, sampling)
    return compute_seconds_per_layer(lm.stats)


def _measure(
    row: _Row,
    models: EmulatedModels,
    prompts: list[np.ndarray],
    sampling: SamplingOptions,
    expected: list[list[int]],
    trace: RoutingTrace,
) -> None:
    predictor = None if row.mode == "off" else "pregate"
    lm = models.make(row.residency, row.link, prefetch=row.mode, predictor=predictor)
    row.equal &= [result.tokens for result in lm.generate(prompts, sampling)] == expected
    decode = lm.stats.decode
    row.seconds.append(decode.seconds / decode.tokens)
    row.stalls.append(decode.stall_seconds / decode.tokens)
    if not row.corrected:
        again = simulate(
            trace,
            slots=lm.plan.slots,
            staging_slots=lm.plan.staging_slots,
            link=row.link,
            compute_seconds=compute_seconds_per_layer(lm.stats),
            predictor=predictor or "none",
            prefetch=row.mode,
        ).decode
        row.replayed.append(again.seconds / again.tokens)


def _figures(row: _Row) -> dict[str, Any]:
    ms = 1e3 * statistics.median(row.seconds)
    replayed = 1e3 * statistics.median(row.replayed) if row.replayed else None
    return {
        "mode": row.name,
        "ratio": row.ratio,
        "residency": row.residency,
        "ms_per_token": rounded(ms),
        "ms_least": rounded(1e3 * min(row.seconds)),
        "ms_most": rounded(1e3 * max(row.seconds)),
        "stall_ms_per_token": rounded(1e3 * statistics.median(row.stalls)),
        "replayed_ms_per_token": None if replayed is None else rounded(replayed),
        "tokens_equal": row.equal,
    }


def _show(rows: list[dict[str, Any]], layer_seconds: float) -> None:
    print(f"bundled model over an emulated link, batch 1, {1e3 * layer_seconds:.3f} ms a layer")
    head = ["x balance", "resident %", "prefetch", "tokens/s", "ms/token", "of off", "stall ms", "replayed ms"]
    cells = []
    for row in rows:
        off = next(
            other["ms_per_token"]
            for other in rows
            if other["mode"] == "off" and all(other[name] == row[name] for name in ("ratio", "residency"))
        )
        cells.append(
            (
                f"{row['ratio']:g}",
                f"{100 * row['residency']:g}",
                row["mode"],
                f"{1e3 / row['ms_per_token']:.0f}",
                f"{row['ms_per_token']:.2f}",
                f"{row['ms_per_token'] / off:.3f}",
                f"{row['stall_ms_per_token']:.2f}",
                None if row["replayed_ms_per_token"] is None else f"{row['replayed_ms_per_token']:.2f}",
            )
        )
    print(table(head, cells))
    equal = all(row["tokens_equal"] for row in rows)
    print(f"all rows gave {'the' if equal else 'NOT THE'} tokens of the all-resident run", end="\n\n")
