"""One stage of `bench.large` in a process of its own, so that its peak memory is its own.

    python -m bench._stage convert SRC DST
    python -m bench._stage generate MODEL BUDGET TOKENS

One last line of JSON. "peak_rss_bytes" is the kernel's high-water mark of this process (VmHWM), file-backed pages
included; "storage_bytes" what the kernel fetched from storage for it. Convert: "seconds" of `ef-convert`. Generate:
"load_seconds" of `ef_jax.load`, "weights_seconds" of that after the memory plan (weights read and placed),
"tokens_per_second" of decoding, "peak_device_bytes" (see `ef_jax.Stats`), the plan's bytes and the tokens.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROMPT_TOKENS = 32


def main() -> int:
    """Run the stage that the command line names; the exit code."""
    stages: dict[str, Callable[..., dict[str, Any]]] = {"convert": convert, "generate": generate}
    result = stages[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result | _process()))
    return 0


def convert(source: str, destination: str) -> dict[str, Any]:
    """Convert a checkpoint."""
    from checkpoints_tools.cli import main as ef_convert

    began = time.perf_counter()
    code = ef_convert([source, destination])
    if code:
        sys.exit(code)
    return {"seconds": time.perf_counter() - began}


def generate(model: str, budget: str, tokens: str) -> dict[str, Any]:
    """Load a checkpoint under a device budget and generate from token ids."""
    import ef_jax
    from ef_jax.inline_dispatch import dispatch_inline

    dispatch_inline()
    planned: list[float] = []
    began = time.perf_counter()
    lm = ef_jax.load(
        model,
        device_memory=int(budget),
        context=1024,
        progress=False,
        on_plan=lambda _: planned.append(time.perf_counter()),
    )
    loaded = time.perf_counter()
    prompt = [(7 * index + 1) % lm.spec.vocab for index in range(_PROMPT_TOKENS)]
    output = lm.generate([prompt], max_new_tokens=int(tokens), ignore_eos=True)[0]
    stats = lm.stats
    return {
        "load_seconds": loaded - began,
        "weights_seconds": loaded - planned[0],
        "generate_seconds": time.perf_counter() - loaded,
        "prefill_seconds": stats.prefill.seconds,
        "tokens_per_second": stats.tokens_per_second,
        "bytes_moved": stats.prefill.bytes_demand + stats.decode.bytes_demand,
        "peak_device_bytes": stats.peak_device_bytes,
        "planned_device_bytes": lm.plan.total,
        "slots": lm.plan.slots,
        "experts": lm.plan.experts,
        "tokens": output.tokens,
        "logprobs": output.logprobs,
    }


def _process() -> dict[str, int | None]:
    return {
        "peak_rss_bytes": process_field("status", "VmHWM", 1024),
        "storage_bytes": process_field("io", "read_bytes", 1),
    }


def process_field(file: str, name: str, unit: int) -> int | None:
    """A number of this process in /proc; None where the system does not tell."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name + ":")), None)


if __name__ == "__main__":
    sys.exit(main())
