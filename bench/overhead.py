"""What does serving experts layer by layer cost, when no expert has to be waited for?

    python -m bench.overhead [--only host single transformers] [--repeats 5] [--save]

host: host time for a layer and a token of decoding (bundled model, batch 1), in microseconds, by share of the experts
  that are cached. "host" is the time of `Engine.step` when every compiled program, cache inserts included, is replaced
  by one of the same arguments, results and donations that computes nothing, and routes are played back from a real run;
  divided by decoder layers. It includes Python, residency, numpy, the calls of the programs and the read-back of
  results that are ready. From a run with clocks: "read_back" (routes and tokens to numpy), "admit" (residency),
  "link_start" and "link_finish" (the calls of the inserts included), "dispatch" (calls of the other programs),
  "other" (what is left of the step, and the clocks). "real" is the whole step with the real programs, and
  "real_unblocked" that without the time in read-backs; on a CPU it still holds whatever XLA computes inside a call.
single: decoding with every expert on the device (made-up weights, `--shape`, batch 1, greedy), in milliseconds a
  token: "engine" is `Engine.step`, "single_program" one jitted program for the whole step of the same functions,
  kernel, weights, pool and context, dispatched ahead with no host in the loop. "tokens_equal" counts equal tokens.
transformers: tokens a second of greedy decoding (bundled model, batch 1, one prompt), tokens after the first over the
  time they take: of `lm.generate` with text (call minus prefill) by share of the experts that are cached, and of
  Hugging Face `generate` in torch on the CPU for each weight type, number of threads and implementation of the
  experts, of which only the fastest are repeated. "ratio" is ours over the best of theirs, "ratio_to_same_dtype" over
  the best that computes in the checkpoint's own dtype, as ours does and as their default is; "tokens_equal" how many
  tokens agree before the first that does not. Both sides are measured in turns: ours, theirs, ours.

Figures are medians over repeats with the least and the largest; contenders take turns within a repeat. Prints tables,
then one line of JSON.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ef_jax
from bench import _models, _report, _run
from bench._host_work import COMPONENTS, HostWork
from bench._single_program import SingleProgram
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.loading import bundled_model
from ef_jax.sampling_options import SamplingOptions

FRACTIONS = (0.25, 0.5, 1.0)
TARGETS = {"host_us_per_layer_token": 150.0, "engine_over_single_program": 1.25, "ratio_to_transformers": 3.0}
_PROMPT_TOKENS = 32


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "host": host,
        "single": single,
        "transformers": transformers,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--repeats", type=_report.positive, default=5)
    parser.add_argument("--tokens", type=_report.positive, default=128, help="tokens to decode in a repeat")
    parser.add_argument("--shape", type=_models.parse_shape, default="D=1024,F=512,E=64,K=8,L=8", help="of part single")
    parser.add_argument("--scratch", type=Path, help="directory for the made-up weights")
    _report.add_save_option(parser, "overhead")
    options = parser.parse_args()
    result: dict[str, Any] = {"devices": _report.devices(), "tokens": options.tokens, "targets": TARGETS}
    for part in options.only:
        result[part] = parts[part](options)
    _report.finish("overhead", result, options.save, ["torch", "transformers"])
    return 0


def host(options: argparse.Namespace) -> dict[str, Any]:
    """Host time for a layer and a token by share of cached experts."""
    works = {}
    for fraction in FRACTIONS:
        lm = ef_jax.load(expert_fraction=fraction, context=_context(options.tokens), progress=False)
        works[str(fraction)] = HostWork(lm._engine, _models.prompts(lm, 1, _PROMPT_TOKENS)[0], options.tokens)
    for _ in range(options.repeats):
        for work in works.values():
            work.repeat()
    result = {fraction: work.result() for fraction, work in works.items()}
    names = ["host", *COMPONENTS, "other", "real", "real_unblocked"]
    print("host time, us for a layer and a token (medians)")
    rows = [
        (
            name,
            f"{row['misses_per_token']:.1f}",
            *(f"{row['us_per_layer_token'][figure]['median']:.1f}" for figure in names),
        )
        for name, row in result.items()
    ]
    print(_report.table(["experts cached", "misses/token", *names], rows), end="\n\n")
    return result


def single(options: argparse.Namespace) -> dict[str, Any]:
    """The all-resident engine against one program for the whole step."""
    context = _context(options.tokens)
    with _models.synthetic_directory(options.shape, options.scratch) as path:
        lm = ef_jax.load(path, expert_fraction=1.0, context=context, progress=False)
    engine = lm._engine
    prompt = _models.prompts(lm, 1, _PROMPT_TOKENS)[0]
    until = len(prompt) + options.tokens
    engine.prepare(len(prompt), until)
    program = SingleProgram(engine, engine._dense, engine.programs.span(until))
    times: dict[str, list[float]] = {"engine": [], "single_program": []}
    tokens_equal = 0
    for repeat in range(options.repeats + 1):
        _run.start(engine, [prompt], SamplingOptions(), until)
        before, theirs = program.decode(options.tokens)
        ours = []
        began = time.perf_counter()
        for _ in range(options.tokens):
            ours.append(engine.step([0])[0][0])
        seconds = time.perf_counter() - began
        _run.start(engine, [prompt], SamplingOptions(), until)
        after, _ = program.decode(options.tokens)
        tokens_equal = int(np.sum(theirs == ours))
        if repeat:  # the first is a warm-up
            times["engine"].append(seconds / options.tokens * 1e3)
            times["single_program"] += [before / options.tokens * 1e3, after / options.tokens * 1e3]
    spreads = {name: _report.spread(samples) for name, samples in times.items()}
    ratio = _report.rounded(spreads["engine"]["median"] / spreads["single_program"]["median"])
    shape = {"layers": len(lm.spec.layers), "hidden": lm.spec.hidden, **_fields(lm.spec.experts)}
    print("all experts on the device: " + ", ".join(f"{value} {name}" for name, value in shape.items()))
    rows = [(name, row["median"], row["min"], row["max"]) for name, row in spreads.items()]
    print(_report.table(["ms/token", "median", "min", "max"], rows))
    print(f"engine over single program: {ratio:.3f}; {tokens_equal} of {options.tokens} tokens equal\n")
    return {
        "ms_per_token": spreads,
        "engine_over_single_program": ratio,
        "tokens_equal": tokens_equal,
        "shape": shape,
        "span": engine.programs.span(until),
    }


def transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Decoding against Hugging Face transformers; skipped, with the reason, where torch is missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed"
        print(f"transformers: skipped, {reason}\n")
        return {"skipped": reason}
    models = {
        fraction: ef_jax.load(expert_fraction=fraction, context=_context(options.tokens), progress=False)
        for fraction in FRACTIONS
    }
    prompt = _models.prompts(models[1.0], 1, _PROMPT_TOKENS)[0]
    sampling = SamplingOptions(max_new_tokens=options.tokens, ignore_eos=True)
    ours: dict[str, list[float]] = {str(fraction): [] for fraction in FRACTIONS}
    tokens: list[int] = []
    for lm in models.values():
        lm.generate(prompt, sampling)

    def measure_ours() -> None:
        for _ in range(options.repeats):
            for fraction, lm in models.items():
                prefill = lm.stats.prefill.seconds
                began = time.perf_counter()
                tokens[:] = lm.generate(prompt, sampling)[0].tokens
                seconds = time.perf_counter() - began - (lm.stats.prefill.seconds - prefill)
                ours[str(fraction)].append((options.tokens - 1) / seconds)

    measure_ours()
    theirs = _transformers_rows(prompt, options)
    measure_ours()
    for row in theirs:
        equal = [a == b for a, b in zip(row.pop("tokens"), tokens, strict=False)]
        row["tokens_equal"] = equal.index(False) if False in equal else len(equal)
    spreads = {fraction: _report.spread(rates) for fraction, rates in ours.items()}
    same_dtype = [row for row in theirs if row["dtype"] == models[1.0].spec.dtype]
    best, ratio = _against(spreads, theirs)
    best_same, ratio_same = _against(spreads, same_dtype)
    rows = [
        (f"ef_jax, {name} of the experts", *_three(rate), ratio[name], ratio_same[name])
        for name, rate in spreads.items()
    ]
    rows += [
        (
            f"transformers, {row['dtype']}, {row['experts']}, {row['threads']} threads",
            *_three(row["tokens_per_second"]),
            None,
            None,
        )
        for row in theirs
    ]
    head = ["decoding, tokens/s", "median", "min", "max", "ratio to best", "to best of its dtype"]
    print(_report.table(head, rows), end="\n\n")
    return {
        "tokens_per_second": spreads,
        "transformers": theirs,
        "best": best,
        "ratio": ratio,
        "best_of_same_dtype": best_same,
        "ratio_to_same_dtype": ratio_same,
    }


def _against(
    ours: dict[str, dict[str, float]], theirs: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The fastest of `theirs`, and how many times faster each of ours is."""
    best = max(theirs, key=lambda row: row["tokens_per_second"]["median"])
    fastest = best["tokens_per_second"]["median"]
    return best, {name: _report.rounded(rate["median"] / fastest) for name, rate in ours.items()}


def _transformers_rows(prompt: np.ndarray, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Transformers' configurations, measured in another process."""
    command = [
        sys.executable,
        "-m",
        "bench._transformers_decode",
        str(bundled_model()),
        "--tokens",
        str(options.tokens),
    ]
    command += ["--repeats", str(options.repeats)]
    cwd = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=cwd, input=json.dumps(prompt.tolist()), text=True, stdout=subprocess.PIPE, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        for name in ("tokens_per_second", "generate_seconds"):
            row[name] = _report.spread(row[name])
    return rows


def _three(spread: dict[str, Any]) -> tuple[float, float, float]:
    return spread["median"], spread["min"], spread["max"]


def _context(tokens: int) -> int:
    """A context with room for the prompt and `tokens`."""
    return max(256, _PROMPT_TOKENS + tokens)


def _fields(experts: Any) -> dict[str, int]:
    return {"experts": experts.count, "top_k": experts.top_k, "width": experts.width}


if __name__ == "__main__":
    sys.exit(_report.run("overhead", main))
