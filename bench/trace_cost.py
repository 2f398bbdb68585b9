"""What does recording a trace cost?

    python -m bench.trace_cost [--repeats 20] [--tokens 128] [--batch 1] [--save]

The bundled model continues prompts greedily, by share of the experts that are cached. Runs take turns: plain, recorded,
plain, recorded with the routers' weights, plain, and so on. "slowdown" is the time of a recorded run, prompts and the
making of the trace included, over the mean of the plain runs before and after it, less one: median over repeats, least
and largest. "plain again" is a plain run in the place of a recorded one: how far it is from 0 is noise. Prints a table,
then one line of JSON.
"""

import argparse
import sys
import time
from typing import Any

import ef_jax
from bench import _models, _report
from ef_jax.inline_dispatch import dispatch_inline

FRACTIONS = (0.25, 1.0)
TARGET = 0.03
_PROMPT_TOKENS = 32
_CONTENDERS = ("recorded", "with_weights", "plain_again")


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=_report.positive, default=20)
    parser.add_argument("--tokens", type=_report.positive, default=128, help="tokens to generate in a run")
    parser.add_argument("--batch", type=_report.positive, default=1, help="sequences that run together")
    _report.add_save_option(parser, "trace_cost")
    options = parser.parse_args()
    rows = [_measure(fraction, options) for fraction in FRACTIONS]
    head = ["experts cached", "plain ms/step", "slowdown %", "min", "max", "with weights %", "plain again %"]
    print(_report.table(head, [_shown(row) for row in rows]))
    result = {"tokens": options.tokens, "batch": options.batch, "target": TARGET, "rows": rows}
    _report.finish("trace_cost", result, options.save)
    return 0


def _measure(fraction: float, options: argparse.Namespace) -> dict[str, Any]:
    context = _PROMPT_TOKENS + options.tokens
    lm = ef_jax.load(expert_fraction=fraction, batch=options.batch, context=context, progress=False)
    prompts = _models.prompts(lm, options.batch, _PROMPT_TOKENS)

    def run(contender: str) -> float:
        began = time.perf_counter()
        if contender in ("plain", "plain_again"):
            lm.generate(prompts, max_new_tokens=options.tokens, ignore_eos=True)
        else:
            with lm.trace(weights=contender == "with_weights") as recording:
                lm.generate(prompts, max_new_tokens=options.tokens, ignore_eos=True)
            recording.trace()
        return time.perf_counter() - began

    run("plain")
    plain = [run("plain")]
    slowdown: dict[str, list[float]] = {name: [] for name in _CONTENDERS}
    for _ in range(options.repeats):
        for contender in _CONTENDERS:
            seconds = run(contender)
            plain.append(run("plain"))
            slowdown[contender].append(seconds / (plain[-2] + plain[-1]) * 2 - 1)
    return {
        "expert_fraction": fraction,
        "plain_ms_per_step": _report.spread([1e3 * seconds / options.tokens for seconds in plain]),
        **{name: _report.spread(values) for name, values in slowdown.items()},
    }


def _shown(row: dict[str, Any]) -> list[Any]:
    recorded = [100 * row["recorded"][name] for name in ("median", "min", "max")]
    others = [100 * row[name]["median"] for name in ("with_weights", "plain_again")]
    return [f"{row['expert_fraction']:g}", row["plain_ms_per_step"]["median"], *recorded, *others]


if __name__ == "__main__":
    sys.exit(_report.run("trace_cost", main))
