"""Decode speed of Hugging Face transformers on the CPU, in a process of its own; `bench.overhead` starts it.

    python -m bench._transformers_decode MODEL --tokens 128 --repeats 2 < prompt.json

Reads token ids as JSON. One last line of JSON: for each weight type, number of threads and implementation of the
experts, tokens a second of greedy decoding with the key/value cache (tokens after the first, over the time from the
first to the last, as a streamer sees them) and seconds of the whole `generate`, as lists. Every configuration is
measured once, over a quarter of the tokens; the three fastest again, `--repeats` times over all of them.
"""

import argparse
import json
import sys
import time
from itertools import product
from typing import Any

import torch
from transformers import AutoModelForCausalLM

_WARM_UP_TOKENS = 8
_FINALISTS = 3


class _Clock:
    """A streamer that notes when tokens arrive; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens have arrived."""
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


def main() -> int:
    """Run every configuration; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    prompt = torch.tensor([json.load(sys.stdin)])
    models = {dtype: _load(options.model, dtype) for dtype in ("bfloat16", "float32")}
    rows = []
    for dtype, experts, threads in product(models, ("eager", "batched_mm", "grouped_mm"), options.threads):
        row: dict[str, Any] = {"dtype": dtype, "experts": experts, "threads": threads}
        rows.append(row | _measure(models[dtype], row, prompt, max(_WARM_UP_TOKENS, options.tokens // 4), 1))
    rows.sort(key=lambda row: -row["tokens_per_second"][0])
    for row in rows[:_FINALISTS]:
        row |= _measure(models[row["dtype"]], row, prompt, options.tokens, options.repeats)
    print(json.dumps(rows))
    return 0


def _load(path: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True).eval()


def _measure(model: Any, row: dict[str, Any], prompt: torch.Tensor, tokens: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(row["threads"])
    model.set_experts_implementation(row["experts"])
    _generate(model, prompt, _WARM_UP_TOKENS)
    rates: list[float] = []
    seconds: list[float] = []
    output: list[int] = []
    for _ in range(repeats):
        began = time.perf_counter()
        output, times = _generate(model, prompt, tokens)
        seconds.append(time.perf_counter() - began)
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return {"tokens_per_second": rates, "generate_seconds": seconds, "tokens": output}


def _generate(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[int], list[float]]:
    clock = _Clock()
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            use_cache=True,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=clock,
        )
    return output[0, prompt.shape[1] :].tolist(), clock.times[1:]


if __name__ == "__main__":
    sys.exit(main())
