"""One run of `bench.disk` in a process of its own, so that its peak memory is its own.

    python -m bench._disk_stage MODEL BUDGET TOKENS OPTIONS

OPTIONS is a JSON object of `ef_jax.load`'s. One last line of JSON. "base_rss_bytes" is this process once the programs
are compiled and nothing of the model is in memory, "peak_rss_bytes" its high-water mark at the end (VmHWM).
"""

import json
import sys
import time
from typing import Any

from bench._stage import process_field

_PROMPT_TOKENS = 64


def main() -> int:
    """Run the stage; the exit code."""
    model, budget, tokens, options = sys.argv[1:]
    print(json.dumps(generate(model, int(budget), int(tokens), json.loads(options))))
    return 0


def generate(model: str, budget: int, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint under budgets for device and host memory, and generate from token ids."""
    import ef_jax
    from ef_jax.inline_dispatch import dispatch_inline

    dispatch_inline()
    base: list[int | None] = []
    began = time.perf_counter()
    lm = ef_jax.load(
        model,
        device_memory=budget,
        context=512,
        progress=False,
        on_plan=lambda _: base.append(process_field("status", "VmRSS", 1024)),
        **options,
    )
    loaded = time.perf_counter()
    prompt = [(7 * index + 1) % lm.spec.vocab for index in range(_PROMPT_TOKENS)]
    output = lm.generate([prompt], max_new_tokens=tokens, ignore_eos=True)[0]
    stats, plan, disk = lm.stats, lm.plan, lm.stats.disk
    figures = {
        "load_seconds": loaded - began,
        "prefill_seconds": stats.prefill.seconds,
        "tokens_per_second": stats.tokens_per_second,
        "stall_seconds": stats.decode.stall_seconds,
        "hits": sum(stats.decode.hits),
        "misses": sum(stats.decode.misses),
        "base_rss_bytes": base[0],
        "peak_rss_bytes": process_field("status", "VmHWM", 1024),
        "planned_device_bytes": plan.total,
        "planned_host_bytes": plan.host_bytes,
        "tokens": output.tokens,
        "logprobs": output.logprobs,
    }
    if disk is not None:
        read = disk.bytes_read + disk.bytes_ahead
        figures["disk"] = {
            "places": disk.places,
            "hits": disk.hits,
            "late_hits": disk.late_hits,
            "misses": disk.misses,
            "bytes_read": disk.bytes_read,
            "bytes_ahead": disk.bytes_ahead,
            "bytes_wasted": disk.bytes_wasted,
            "stall_seconds": disk.stall_seconds,
            "read_seconds": disk.read_seconds,
            "read_rate": read / disk.read_seconds,
            "buffers_made": disk.buffers_made,
            "horizon": None if disk.horizon is None else disk.horizon["mean"],
        }
    return figures


if __name__ == "__main__":
    sys.exit(main())
