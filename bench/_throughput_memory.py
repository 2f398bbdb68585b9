"""Part "memory" of `bench.throughput`: the smallest device memory in which decoding still runs.

The bundled model runs in it, with room for a prompt of 32 tokens and 96 more: tokens a second, and the largest sum of
live arrays that was seen. Models that are too large for that are planned only, by the arithmetic of
`ef_jax.memory.plan.make_plan` with no cache slots, for an accelerator with asynchronous copies, at `BATCH` sequences of
`CONTEXT` tokens and prompt chunks of `CHUNK`:

dense: embeddings, attention, routers, shared experts and dense layers. kv_cache: B x context positions of every layer.
staging: the experts that one layer of a step can need, B x K. transfers: `MAX_INSERT` blocks, or two staging rings.
state: B x (V + 64) bytes. workspace: what a chunk holds at once, counted by hand: residual stream, queries, keys,
values and attention's output (5 D in all), K rows a token into and out of the experts (2 K D), their hidden values
(2 K F), all of 16 bits, and logits of 32. reserve: 2 %.

`saved` is the share of what the model takes with every expert in device memory, the other items alike.
"""

import gc
import re
import time
from typing import Any

import ef_jax
from bench import _models, _report
from bench._shapes import ITEM_BYTES, SHAPES, Shape
from ef_jax.errors import BudgetError
from ef_jax.memory.sizes import format_bytes
from ef_jax.schedule.device_link import MAX_INSERT

TARGETS = {"switch_base_128": 0.9372}
BATCH, CONTEXT, CHUNK = 1, 1024, 256
_RESERVE = 1.02
_PROMPT, _TOKENS = 32, 96


def run(repeats: int) -> dict[str, Any]:
    """Plans, and the bundled model measured."""
    plans = {name: plan(shape) for name, shape in SHAPES.items()}
    measured = _measured(repeats)
    rows = [
        (name, each["least_bytes"], each["all_resident_bytes"], each["saved"], None, None)
        for name, each in plans.items()
    ]
    bundled = (
        "bundled model",
        *(measured[name] for name in ("least_bytes", "all_resident_bytes", "saved")),
        measured["least"]["tokens_per_second"]["median"],
        measured["all_resident"]["tokens_per_second"]["median"],
    )
    shown = [
        (name, format_bytes(least), format_bytes(whole), f"{100 * saved:.2f}", *speeds)
        for name, least, whole, saved, *speeds in [*rows, bundled]
    ]
    print(
        _report.table(("device memory", "least", "all resident", "saved %", "tokens/s", "all resident"), shown) + "\n"
    )
    return {"batch": BATCH, "context": CONTEXT, "chunk": CHUNK, "targets": TARGETS, "plans": plans, "bundled": measured}


def plan(shape: Shape, *, batch: int = BATCH, context: int = CONTEXT, chunk: int = CHUNK) -> dict[str, Any]:
    """Bytes by item with nothing but staging, their sum, and the sum with all experts resident."""
    staging = min(shape.experts, batch * shape.top_k)
    rows = batch * chunk
    stream = rows * (5 + 2 * shape.top_k) * shape.hidden * ITEM_BYTES
    items = {
        "dense": shape.dense_bytes,
        "kv_cache": shape.layers * batch * context * shape.cache * ITEM_BYTES,
        "staging": staging * shape.block_bytes,
        "transfers": max(MAX_INSERT, 2 * staging) * shape.block_bytes,
        "state": batch * (shape.vocab + 64),
        "workspace": stream + rows * 2 * shape.top_k * shape.width * ITEM_BYTES + batch * shape.vocab * 4,
    }
    least = round(_RESERVE * sum(items.values()))
    without = sum(items[name] for name in ("dense", "kv_cache", "state", "workspace"))
    whole = round(_RESERVE * (without + shape.expert_bytes))
    return {
        "items": items,
        "least_bytes": least,
        "all_resident_bytes": whole,
        "saved": _report.rounded(1 - least / whole),
    }


def _measured(repeats: int) -> dict[str, Any]:
    """The bundled model in the least memory that works, then all resident, one after another in one process."""
    settings: dict[str, Any] = {"batch": BATCH, "context": _PROMPT + _TOKENS, "chunk": _PROMPT, "prefetch": "off"}
    least = _least(settings)
    small, outputs = _one(repeats, device_memory=least, **settings)
    whole, same = _one(repeats, expert_fraction=1.0, **settings)
    return {
        "context": _PROMPT + _TOKENS,
        "chunk": _PROMPT,
        "least_bytes": small["bytes"],
        "all_resident_bytes": whole["bytes"],
        "saved": _report.rounded(1 - small["bytes"] / whole["bytes"]),
        "outputs_equal": outputs == same,
        "least": small,
        "all_resident": whole,
    }


def _one(repeats: int, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """A model of these settings: what it takes and does, and what it says."""
    gc.collect()
    lm = ef_jax.load(progress=False, **settings)
    prompt = _models.prompts(lm, 1, _PROMPT)
    speeds: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        (generated,) = lm.generate(prompt, max_new_tokens=_TOKENS, ignore_eos=True)
        speeds.append(_TOKENS / (time.perf_counter() - began))
    figures = {
        "bytes": lm.plan.total,
        "plan": lm.plan.items,
        "slots": lm.plan.slots,
        "staging_slots": lm.plan.staging_slots,
        "peak_device_bytes": lm.stats.peak_device_bytes,
        "tokens_per_second": _report.spread(speeds[1:]),
    }
    return figures, [generated.tokens, generated.logprobs]


def _least(settings: dict[str, Any]) -> int:
    """The smallest budget that works, as the refusal of a smaller one says."""
    try:
        ef_jax.load(device_memory=1, progress=False, **settings)
    except BudgetError as error:
        found = re.search(r"at least (\d+) bytes", str(error))
        if found is None:
            raise
        return int(found[1])
    raise AssertionError("a budget of one byte cannot work")
