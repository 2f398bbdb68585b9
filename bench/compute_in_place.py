"""Is a missing expert sooner computed by the host than copied to the device, and does miss="auto" know?

    python -m bench.compute_in_place [--only here beside] [--batches 1 4 16 64 256] [--repeats 3] [--save]

Decodes with miss "fetch", "compute" and "auto" at emulated rates of PCIe 3 and 4 (12 and 25 GB/s), without prefetching.

here: experts of the sizes of real models (made-up weights, `--shapes`, 2 layers of 32 experts, 8 a token), on this CPU
  alone, by the clock on the wall. Copies are held back as the link would hold them. The CPU is device and host at once:
  what is copied costs it an insert into a slot besides, and is computed by it afterwards as what is not copied would
  have been. So computing in place can save time here and cannot cost any.
beside: the bundled model, whose CPU plays an accelerator. Everything else is slower by as much as this CPU is slower
  than that accelerator: `stretch` is what this CPU takes for an expert of one row, over what a memory of `--memory`
  takes to read it. The link is stretched by it, and so is a host of `--host` bandwidth and FLOP/s, whose results are
  held back. Seconds and tokens a second are those of stretched time; only their ratios mean something. The time that
  Python takes is not stretched, so it counts for less than on a real machine.

"tokens_per_second" are medians over repeats, in which the ways take turns; "auto_over_best" is auto's over that of the
better of the two others. "computed" is auto's share of the absent experts. Prints tables, then one line of JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ef_jax
from bench import _report, _run
from bench._emulated import EmulatedModels
from bench._emulated_host import emulated_host
from bench._models import prompts, synthetic_directory
from bench.make_synthetic import Synthetic
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.memory.rates import parse_bandwidth
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel

WAYS = ("fetch", "compute", "auto")
RATES = {"PCIe 3": "12GB/s", "PCIe 4": "25GB/s"}
SHAPES = {
    "olmoe": Synthetic(hidden=2048, width=1024, layers=2, experts=32, top_k=8),
    "qwen3_30b_a3b": Synthetic(hidden=2048, width=768, layers=2, experts=32, top_k=8),
    "tiny": Synthetic(hidden=64, width=32, layers=2, experts=8, top_k=2, vocab=256),
}
_PROMPT_TOKENS = 4
_CONTEXT = 64
_PROBES = 20
_HEAD = ("", "batch", "fetch", "compute", "auto", "auto/best", "auto computed", "MB/token fetch", "auto")


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parts: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"here": here, "beside": beside}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--batches", nargs="+", type=_report.positive, default=[1, 4, 16, 64, 256], metavar="N")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["olmoe", "qwen3_30b_a3b"])
    parser.add_argument("--fraction", type=float, default=0.5, help="of the experts that have a slot (default: 0.5)")
    parser.add_argument("--steps", type=_report.positive, default=24, help="of a run (default: 24)")
    parser.add_argument("--repeats", type=_report.positive, default=3)
    parser.add_argument("--memory", default="1000GB/s", help="of the accelerator played (default: 1000GB/s)")
    parser.add_argument("--host", nargs=2, default=["60GB/s", "5e11"], metavar=("RATE", "FLOPS"))
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where made-up weights are written meanwhile")
    _report.add_save_option(parser, "compute_in_place")
    options = parser.parse_args()
    result: dict[str, Any] = {"fraction": options.fraction, "steps": options.steps}
    for part in options.only:
        result[part] = parts[part](options)
        print(f"\n{part}\n" + _report.table(_HEAD, map(_cells, result[part])))
    _report.finish("compute_in_place", result, options.save)
    return 0


def here(options: argparse.Namespace) -> list[dict[str, Any]]:
    """This CPU alone, with blocks of real sizes; batches up to 16."""
    points = []
    for name in options.shapes:
        with synthetic_directory(SHAPES[name], options.scratch) as path:
            for batch in (batch for batch in options.batches if batch <= 16):
                models = EmulatedModels(_all_resident(path, batch))
                points += [{"model": name, **point} for point in _compared(models, options, RATES.items())]
    return points


def beside(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundled model on an accelerator that this CPU plays, beside an emulated host."""
    bandwidth, flops = parse_bandwidth(options.host[0]), float(options.host[1])
    points = []
    for batch in options.batches:
        models = EmulatedModels(_all_resident(None, batch))
        engine = models.lm._engine
        real = HostExperts(models.lm.spec, engine.programs.kernels, batch=batch, device=engine.device)
        stretch = min(real.probe(1) for _ in range(_PROBES)) / (
            models.lm.spec.block_bytes / parse_bandwidth(options.memory)
        )
        rates = {name: f"{parse_bandwidth(rate) / 1e9 / stretch:.9f}GB/s" for name, rate in RATES.items()}
        host = emulated_host(bandwidth=bandwidth, flops=flops, stretch=stretch)
        compared = _compared(models, options, rates.items(), host)
        points += [{"model": "small_moe", "stretch": _report.rounded(stretch), **point} for point in compared]
    return points


def _all_resident(path: Path | None, batch: int) -> ef_jax.LanguageModel:
    return ef_jax.load(path, expert_fraction=1.0, batch=batch, context=_CONTEXT, chunk=16, progress=False)


def _compared(
    models: EmulatedModels,
    options: argparse.Namespace,
    rates: Iterable[tuple[str, str]],
    host: type[HostExperts] = HostExperts,
) -> list[dict[str, Any]]:
    points = []
    for link, rate in rates:
        made = {
            way: models.make(
                options.fraction, LinkModel.parse(rate), prefetch="off", predictor=None, miss=way, host_kind=host
            )
            for way in WAYS
        }
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way, lm in made.items():
                runs[way].append(_decoded(lm, options.steps))
        speed = {way: statistics.median(run["tokens_per_second"] for run in runs[way]) for way in WAYS}
        auto = runs["auto"][-1]
        points.append(
            {
                "link": link,
                "rate": rate,
                "batch": models.lm.plan.batch,
                "tokens_per_second": {
                    way: _report.spread([run["tokens_per_second"] for run in runs[way]]) for way in WAYS
                },
                "auto_over_best": _report.rounded(speed["auto"] / max(speed["fetch"], speed["compute"])),
                "computed": _report.rounded(auto["computed"] / max(1, auto["computed"] + auto["misses"])),
                "bytes_per_token": {way: runs[way][-1]["bytes_per_token"] for way in WAYS},
                "hits": {way: runs[way][-1]["hit_rate"] for way in WAYS},
                "miss": made["auto"].stats.miss,
            }
        )
    return points


def _decoded(lm: ef_jax.LanguageModel, steps: int) -> dict[str, Any]:
    """What so many steps of a full batch count."""
    engine, batch = lm._engine, lm.plan.batch
    options = SamplingOptions(temperature=1.0, seed=1)
    _run.start(engine, prompts(lm, batch, _PROMPT_TOKENS), options, _PROMPT_TOKENS + 2 + steps)
    engine.step(range(batch))
    lm.stats.reset()
    for _ in range(steps):
        engine.step(range(batch))
    _run.stop(engine, batch)
    decode = lm.stats.decode
    hits, misses, computed = sum(decode.hits), sum(decode.misses), sum(decode.computed)
    return {
        "tokens_per_second": lm.stats.tokens_per_second,
        "computed": computed,
        "misses": misses,
        "hit_rate": _report.rounded(hits / (hits + misses + computed)),
        "bytes_per_token": _report.rounded(decode.bytes_moved / decode.tokens),
    }


def _cells(point: dict[str, Any]) -> tuple[Any, ...]:
    speed, moved = point["tokens_per_second"], point["bytes_per_token"]
    return (
        f"{point['model']}, {point['link']}",
        point["batch"],
        *(f"{speed[way]['median']:.4g}" for way in WAYS),
        f"{point['auto_over_best']:.2f}",
        f"{100 * point['computed']:.0f} %",
        f"{moved['fetch'] / 1e6:.2f}",
        f"{moved['auto'] / 1e6:.2f}",
    )


if __name__ == "__main__":
    sys.exit(_report.run("compute_in_place", main))
