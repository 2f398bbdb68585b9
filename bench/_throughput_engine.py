"""Part "engine" of `bench.throughput`: the bundled model here, over an emulated link, by the clock on the wall.

Prompts are pieces of the model's held-out texts, six domains in turn, 4 to 40 tokens long, each with 8 to 96 tokens to
generate: 64 of them, all there at the beginning. The link is "balanced": it carries K blocks while a layer of an
all-resident step of one sequence runs, as measured first. 25 % of the experts have slots, where there is a cache.
Tokens a second count all that is generated over all the time, prompts included; medians over repeats.

on demand, one by one; on demand, batched; lru, batched: B requests together, the next B when all of them have ended.
ours: R sequences held, steps of B by the token scheduler, routing paths and pre-gate, automatic prefetching,
  `next_use`.
no ...: ours without one part each. narrow: ours with R = B. all resident: every expert on the device.
all resident, batched: the same, B requests together.

`--routing-path` names the predictor (`ef-jax train-predictor - TRACE.. --kind routing_path`); without it the arms that
need one are left out, and the bench says so.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ef_jax
from bench import _report
from ef_jax.loading import bundled_model
from ef_jax.schedule.link_model import LinkModel

RESIDENT = 0.25
_CONTEXT = 160
_SHORTEST, _LONGEST = 4, 40
_FEWEST, _MOST = 8, 96
_LETTERS = 6  # of a token, at most, on average

Job = tuple[np.ndarray, int]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All arms; prints a table."""
    batch, rows, path = options.batch, options.rows, options.routing_path
    link = balanced_link()
    common: dict[str, Any] = {"context": _CONTEXT, "chunk": 64, "progress": False, "emulate_link": link}
    demand = {**common, "expert_fraction": 0.0, "prefetch": "off"}
    lru = {**common, "expert_fraction": RESIDENT, "prefetch": "off"}
    ours = {
        **common,
        "expert_fraction": RESIDENT,
        "batch": batch,
        "sequences": rows,
        "policy": "next_use",
        "routing_path": path,
    }
    resident = {**common, "expert_fraction": 1.0, "batch": batch}
    arms: dict[str, tuple[dict[str, Any], int | None]] = {
        "on demand, one by one": ({**demand, "batch": 1}, 1),
        "on demand, batched": ({**demand, "batch": batch}, batch),
        "lru, batched": ({**lru, "batch": batch}, batch),
        "ours": (ours, None),
        "no continuous batching": (ours, rows),
        "no cache": ({**ours, "expert_fraction": 0.0, "policy": "lru", "prefetch": "off"}, None),
        "no prefetch": ({**ours, "prefetch": "off"}, None),
        "no routing path, no token scheduler": ({**ours, "routing_path": None}, None),
        "narrow": ({**ours, "sequences": batch}, None),
        "all resident, batched": (resident, batch),
        "all resident": (resident, None),
    }
    if path is None:
        print("no --routing-path: ours runs without predicted paths, so without a token scheduler")
        del arms["no cache"], arms["no routing path, no token scheduler"]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    texts: dict[str, Any] = {}
    for name, (settings, together) in arms.items():
        gc.collect()
        lm = ef_jax.load(**settings)
        work = jobs(lm, options.requests)
        for repeat in range(options.repeats + 1):
            sample, texts[name] = _serve(lm, work, together)
            if repeat:  # the first compiles and warms up
                samples[name].append(sample)
        del lm
    result = _result(samples, texts, batch, link)
    _show(result)
    return {**result, "batch": batch, "rows": rows, "requests": options.requests, "resident": RESIDENT}


def balanced_link() -> LinkModel:
    """A link that carries K blocks in a layer's time of an all-resident step of one sequence."""
    lm = ef_jax.load(expert_fraction=1.0, context=_CONTEXT, chunk=64, progress=False)
    prompt = jobs(lm, 1)[0][0]
    for _ in range(2):
        lm.stats.reset()
        lm.generate([prompt], max_new_tokens=_MOST, ignore_eos=True)
    phase = lm.stats.decode
    layer_seconds = phase.seconds / phase.steps / len(lm.spec.moe_layers)
    return LinkModel(bandwidth=lm.spec.experts.top_k * lm.spec.block_bytes / layer_seconds)


def jobs(lm: ef_jax.LanguageModel, count: int) -> list[Job]:
    """Prompts and the tokens to generate, the same every time."""
    assert lm.tokenizer is not None
    random = np.random.default_rng(0)
    texts = [path.read_text() for path in sorted((Path(bundled_model()) / "valid").glob("*.txt"))]
    made = []
    for number in range(count):
        text, length = texts[number % len(texts)], int(random.integers(_SHORTEST, _LONGEST + 1))
        at = text.index(" ", int(random.integers(len(text) - _LETTERS * _LONGEST - 100)))
        ids = lm.tokenizer.encode(text[at : at + _LETTERS * _LONGEST])[:length]
        made.append((np.asarray(ids, np.int32), int(random.integers(_FEWEST, _MOST + 1))))
    return [made[place] for place in random.permutation(count)]


def _serve(lm: ef_jax.LanguageModel, work: Sequence[Job], together: int | None) -> tuple[dict[str, Any], list[Any]]:
    """All jobs, `together` at a time (None: all at once): figures, and what was generated."""
    if not lm._engine.residency.all_resident:
        lm._engine.residency.clear()
    lm.stats.reset()
    began = time.perf_counter()
    outputs = []
    for first in range(0, len(work), together or len(work)):
        part = work[first : first + (together or len(work))]
        submitted = [lm.submit(ids, max_new_tokens=count, ignore_eos=True) for ids, count in part]
        outputs += [each.result() for each in submitted]
    seconds = time.perf_counter() - began
    decode = lm.stats.decode
    asked = sum(decode.hits) + sum(decode.late_hits) + sum(decode.misses)
    moved = decode.bytes_demand + decode.bytes_prefetch
    return {
        "tokens_per_second": sum(len(each.tokens) for each in outputs) / seconds,
        "prefill_share": lm.stats.prefill.seconds / seconds,
        "steps": decode.steps,
        "width": decode.tokens / decode.steps,
        "hit": sum(decode.hits) / asked,
        "blocks_per_token_layer": moved / lm.spec.block_bytes / decode.tokens / len(decode.hits),
        "wasted": decode.bytes_wasted / max(moved, 1),
        "stall_share": decode.stall_seconds / decode.seconds,
    }, [(each.tokens, each.logprobs) for each in outputs]


def _result(
    samples: dict[str, list[dict[str, Any]]], texts: dict[str, Any], batch: int, link: LinkModel
) -> dict[str, Any]:
    arms = {
        name: {key: _report.spread([sample[key] for sample in of_arm]) for key in of_arm[0]}
        for name, of_arm in samples.items()
    }
    speed = {name: arm["tokens_per_second"]["median"] for name, arm in arms.items()}
    wide = [text for name, text in texts.items() if name != "on demand, one by one"]  # of one width, so of equal bits
    return {
        "bandwidth": _report.rounded(link.bandwidth),
        "outputs_equal": all(text == wide[0] for text in wide),
        "ours_of": {name: _report.rounded(speed["ours"] / each) for name, each in speed.items()},
        "arms": arms,
    }


def _show(result: dict[str, Any]) -> None:
    columns = ("hit", "blocks_per_token_layer", "wasted", "stall_share", "prefill_share", "width")
    head = ["", "tokens/s", "ours is", "hit", "blocks", "wasted", "stall", "prefill", "width"]
    rows = [
        (
            name,
            arm["tokens_per_second"]["median"],
            f"{result['ours_of'][name]:.2f} x",
            *(arm[key]["median"] for key in columns),
        )
        for name, arm in result["arms"].items()
    ]
    print(f"bundled model by the clock, link of {result['bandwidth'] / 1e9:.3g} GB/s; blocks a token and layer")
    print(_report.table(head, rows))
    print(f"arms of one width gave {'the same' if result['outputs_equal'] else 'DIFFERENT'} outputs\n")
