"""How fast does decoding go with a share of the experts on the device, and how far is that from the ceiling?

    python -m bench.offload [--model DIR | --shape D=1024,F=512,E=64,K=8,L=8] [--batch 1] [--save]

Rows: "on-demand" (no cache: what a layer needs is copied at every step), "layer streaming" (every layer's whole expert
set is copied at every step, the next layer's while one computes), "lru" and "static" at shares of the experts, and
"all resident". In every repeat a row begins with an empty cache and runs all prompts, one batch after another; rows
take turns. Tokens are sampled (temperature 0.8, top-p 0.9, fixed seed), so that the small model does not loop; all rows
must give the same ones, and "tokens_equal" says whether they did.

A step is one token for each sequence of the batch. Columns, all of decoding alone: cache slots; tokens/s of the whole
batch; MB over the link a step; hit % (distinct experts a layer and step needed that were in a slot; none for layer
streaming, which asks for all); stall ms a step (host time in handing over copies, see `ef_jax.Stats`); ms a step;
bound = max(step of "all resident", bytes / link bandwidth) in ms a step; "of bound" = bound over measured, 1 being the
ceiling. Link bandwidth is that of a loop which copies blocks into slots, eight a call, with nothing else going on.

Figures are medians over repeats, with the least and the largest in the JSON. Programs run inline on CPU, as in
`ef-jax generate` (`ef_jax.inline_dispatch`). Prints a table, then one line of JSON.
"""

import argparse
import contextlib
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ef_jax
from bench import _models, _report
from bench._streaming import streaming_model
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.device_link import DeviceLink

SHARES = (0.125, 0.25, 0.5)
_LINK_SECONDS = 0.2
_TIMED = ("tokens_per_second", "ms_per_step", "stall_ms_per_step")


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="checkpoint directory (default: the bundled model)")
    source.add_argument("--shape", type=_models.parse_shape, help="made-up weights, e.g. D=1024,F=512,E=64,K=8,L=8")
    parser.add_argument("--batch", type=_report.positive, default=1)
    parser.add_argument("--prompts", type=_report.positive, default=6)
    parser.add_argument("--prompt-tokens", type=_report.positive, default=32)
    parser.add_argument("--tokens", type=_report.positive, default=128, help="tokens to decode after each prompt")
    parser.add_argument("--repeats", type=_report.positive, default=3)
    parser.add_argument("--scratch", type=Path, help="directory for made-up weights")
    _report.add_save_option(parser, "offload")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path = (
            stack.enter_context(_models.synthetic_directory(options.shape, options.scratch)) if options.shape else None
        )
        models = load_all(path or options.model, options)
    result = measure(models, options)
    _report.finish("offload", result, options.save)
    return 0


def measure(models: dict[tuple[str, float], LanguageModel], options: argparse.Namespace) -> dict[str, Any]:
    """Run all rows and print the table; the JSON's own part."""
    any_model = next(iter(models.values()))
    prompts = _models.prompts(any_model, options.prompts, options.prompt_tokens)
    sampling = SamplingOptions(max_new_tokens=options.tokens + 1, temperature=0.8, top_p=0.9, ignore_eos=True)
    samples: dict[tuple[str, float], list[dict[str, Any]]] = {name: [] for name in models}
    texts: list[list[list[int]]] = []
    rates = [link_bandwidth(any_model)]
    for repeat in range(options.repeats + 1):
        for name, lm in models.items():
            sample, tokens = _run(lm, prompts, sampling)
            texts.append(tokens)
            if repeat:  # the first compiles and warms up
                samples[name].append(sample)
        rates.append(link_bandwidth(any_model))
    bandwidth = _report.spread(rates)
    resident = _report.spread([sample["ms_per_step"] for sample in samples["all resident", 1.0]])["median"]
    rows = [_row(name, models[name], samples[name], resident, bandwidth["median"]) for name in models]
    print(f"link {bandwidth['median']:.2f} GB/s ({any_model._engine.link.mode}); batch {options.batch}")
    head = ["experts", "slots", "tokens/s", "MB/step", "hit %", "stall ms", "ms/step", "bound", "of bound"]
    print(_report.table(head, [_cells(row) for row in rows]))
    tokens_equal = all(tokens == texts[0] for tokens in texts)
    print(f"all rows gave {'the same' if tokens_equal else 'DIFFERENT'} tokens")
    return {
        "model": "synthetic" if options.shape else _models.model_name(any_model.path),
        "shape": _shape(any_model),
        "devices": _report.devices(),
        "copy_mode": any_model._engine.link.mode,
        "batch": options.batch,
        "prompts": options.prompts,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "link_gb_per_second": bandwidth,
        "tokens_equal": tokens_equal,
        "rows": rows,
    }


def link_bandwidth(lm: LanguageModel) -> float:
    """GB/s of copying every block in turn into eight slots, for at least `_LINK_SECONDS`."""
    engine = lm._engine
    store, spec = engine.link._store, lm.spec
    link = DeviceLink(spec, store, engine.device, slots=MAX_INSERT, mode=engine.link.mode)
    slots = list(range(MAX_INSERT))
    layers, count = len(spec.moe_layers), spec.experts.count
    firsts = product(range(layers), range(0, count, MAX_INSERT))
    groups = [(layer, range(first, min(first + MAX_INSERT, count))) for layer, first in firsts]
    link.finish(link.start(*groups[0]), slots[: len(groups[0][1])])
    jax.block_until_ready(link.pool.array)
    moved, began, seconds = link.bytes_moved, time.perf_counter(), 0.0
    while seconds < _LINK_SECONDS:
        for layer, experts in groups:
            link.finish(link.start(layer, experts), slots[: len(experts)])
        jax.block_until_ready(link.pool.array)
        seconds = time.perf_counter() - began
    return (link.bytes_moved - moved) / seconds / 1e9


def load_all(path: Path | None, options: argparse.Namespace) -> dict[tuple[str, float], LanguageModel]:
    """Every row's model by `(mode, share of the experts)`; they have one host store and one set of dense weights."""
    on_demand = ef_jax.load(
        path,
        expert_fraction=0.0,
        batch=options.batch,
        context=options.prompt_tokens + options.tokens + 1,
        progress=False,
    )
    models = {("on-demand", 0.0): on_demand, ("layer streaming", 0.0): streaming_model(on_demand)}
    for policy, share in product(("lru", "static"), SHARES):
        models[policy, share] = _models.with_cache(on_demand, share, policy)
    models["all resident", 1.0] = _models.with_cache(on_demand, 1.0, "lru")
    return models


def _run(
    lm: LanguageModel, prompts: list[np.ndarray], sampling: SamplingOptions
) -> tuple[dict[str, Any], list[list[int]]]:
    """One repeat of a row: its decode figures, and the tokens."""
    residency = lm._engine.residency
    if not residency.all_resident:
        residency.clear()
    lm.stats.reset()
    outputs = lm.generate(prompts, sampling)
    phase = lm.stats.decode
    return {
        "tokens_per_second": phase.tokens / phase.seconds,
        "ms_per_step": phase.seconds / phase.steps * 1e3,
        "bytes_per_token": phase.bytes_demand / phase.tokens,
        "bytes_per_step": phase.bytes_demand / phase.steps,
        "stall_ms_per_step": phase.stall_seconds / phase.steps * 1e3,
        "hits": sum(phase.hits),
        "misses": sum(phase.misses),
    }, [output.tokens for output in outputs]


def _row(
    name: tuple[str, float], lm: LanguageModel, samples: list[dict[str, Any]], resident: float, gb_per_second: float
) -> dict[str, Any]:
    mode, share = name
    first = samples[0]
    timed = {key: _report.spread([sample[key] for sample in samples]) for key in _TIMED}
    bound = max(resident, first["bytes_per_step"] / gb_per_second / 1e6)
    streaming = mode == "layer streaming"
    return {
        "mode": mode,
        "expert_fraction": share,
        "slots": lm.plan.slots,
        "staging_slots": lm.plan.staging_slots,
        **timed,
        "bytes_per_step": round(first["bytes_per_step"], 1),
        "bytes_per_token": round(first["bytes_per_token"], 1),
        "hits": None if streaming else first["hits"],
        "misses": None if streaming else first["misses"],
        "hit_rate": None if streaming else _report.rounded(first["hits"] / (first["hits"] + first["misses"])),
        "bound_ms_per_step": _report.rounded(bound),
        "of_bound": _report.rounded(bound / timed["ms_per_step"]["median"]),
    }


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    share = f" {100 * row['expert_fraction']:g} %" if row["mode"] in ("lru", "static") else ""
    hits = None if row["hit_rate"] is None else f"{100 * row['hit_rate']:.1f}"
    return (
        row["mode"] + share,
        row["slots"],
        f"{row['tokens_per_second']['median']:.1f}",
        f"{row['bytes_per_step'] / 1e6:.2f}",
        hits,
        f"{row['stall_ms_per_step']['median']:.2f}",
        f"{row['ms_per_step']['median']:.2f}",
        f"{row['bound_ms_per_step']:.2f}",
        f"{row['of_bound']:.2f}",
    )


def _shape(lm: LanguageModel) -> dict[str, int]:
    spec = lm.spec
    return {
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "experts": spec.experts.count,
        "top_k": spec.experts.top_k,
        "width": spec.experts.width,
        "block_bytes": spec.block_bytes,
    }


if __name__ == "__main__":
    sys.exit(_report.run("offload", main))
