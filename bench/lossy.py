"""What do the lossy options cost in quality, and what do they buy?

    python -m bench.lossy [--only NAME ...] [--tokens 256] [--fraction 0.25] [--link 50MB/s] [--prefetch off]
        [--repeats 1] [--save] [--plot FILE]

The bundled model scores its held-out texts, the first `--tokens` of each of the six domains: the first token as a
prompt and each of the others in a decode step of its own (`lm.score(by_steps=True)`), so that options that act on
decode steps alone show, and so that all runs decode the same tokens. Each option runs alone at several strengths, from
a mild one to one that plainly hurts, with slots for a share of the experts over an emulated link. The link is slow
enough for a lossless step to wait most of its time, as large models do; "waiting" is that share.

nats: mean negative log-probability of a token; "cost" is what an option adds to the lossless run's. Where what is
  missing decides, nats depend on slots and policy too, but on the link only where something is prefetched.
tokens/s: of decode steps, without the time for logits. MB/token: what crosses the link for a step.
experts: those that a layer of a step has asked for; of them "absent" had no slot, those left out included.

"all resident" is the lossless run with a slot for each expert: as fast as no misses can make it. An option that cannot
run is named with the reason. Prints a table, then one line of JSON.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from bench import _lossy_plot, _models, _report
from ef_jax.errors import InputError
from ef_jax.loading import load
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.schedule.link_model import LinkModel

STRENGTHS: dict[str, tuple[float | str, ...]] = {
    "lossy_adaptive_experts": (0.95, 0.9, 0.8, 0.7, 0.5),
    "lossy_cache_bias": (0.125, 0.25, 0.5, 1.0, 2.0),
    "lossy_skip": (0.05, 0.1, 0.15, 0.2, 0.25),
    "lossy_low_precision_miss": (0.15, 0.2, 0.25, 0.3, 1.0),
    "lossy_quantize": ("int8", "int4"),
}
_DOMAINS = 6
_WARM_TOKENS = 8


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(STRENGTHS), default=list(STRENGTHS), metavar="NAME")
    parser.add_argument("--tokens", type=_report.positive, default=256, help="of each text")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the experts that have a slot")
    parser.add_argument("--link", default="50MB/s", help="as load's emulate_link")
    parser.add_argument("--prefetch", default="off", help="as load's, or a number of layers")
    parser.add_argument("--repeats", type=_report.positive, default=1, help="of all texts; quality is that of the last")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw nats against tokens a second, as PNG")
    _report.add_save_option(parser, "lossy")
    options = parser.parse_args()
    if options.tokens <= _WARM_TOKENS:
        raise InputError(f"--tokens {options.tokens}: give more than the {_WARM_TOKENS} that warm up")
    settings = {
        "context": options.tokens,
        "chunk": min(256, options.tokens),
        "emulate_link": LinkModel.parse(options.link),
        "prefetch": int(options.prefetch) if options.prefetch.isdecimal() else options.prefetch,
        "progress": False,
    }
    cases: list[tuple[str, float | str | None]] = [("lossless", None), ("all resident", None)]
    cases += [(name, strength) for name in options.only for strength in STRENGTHS[name]]
    rows: list[dict[str, Any]] = []
    refused = []
    for name, strength in cases:
        lossy = {} if strength is None else {name: strength}
        fraction = 1.0 if name == "all resident" else options.fraction
        try:
            lm = load(expert_fraction=fraction, **settings, **lossy)
        except InputError as error:
            if strength is None:
                raise
            refused.append({"option": name, "strength": strength, "because": str(error)})
            continue
        rows.append({"option": name, "strength": strength, **measure(lm, options.tokens, options.repeats)})
        rows[-1]["cost_nats"] = _report.rounded(rows[-1]["nats"] - rows[0]["nats"])
        print(f"{name} {'' if strength is None else strength}: {rows[-1]['nats']:.4f} nats", file=sys.stderr)
    _print_table(rows, options)
    for row in refused:
        print(f"{row['option']} {row['strength']} cannot run: {row['because']}")
    if options.plot is not None:
        _lossy_plot.draw(rows, options.plot)
    result = {
        "model": "small_moe (bundled)",
        "texts": _DOMAINS,
        "tokens_a_text": options.tokens,
        "expert_fraction": options.fraction,
        "link": {"bandwidth": settings["emulate_link"].bandwidth, "latency": settings["emulate_link"].latency},
        "prefetch": options.prefetch,
        "rows": rows,
        "refused": refused,
    }
    _report.finish("lossy", result, options.save)
    return 0


def measure(lm: LanguageModel, tokens: int, repeats: int) -> dict[str, Any]:
    """Quality, speed and bytes of scoring the held-out texts by decode steps."""
    texts = _models.prompts(lm, _DOMAINS, tokens)
    lm.score(texts[0][:_WARM_TOKENS], by_steps=True)
    layers, speeds = len(lm.spec.moe_layers), []
    for _ in range(repeats):
        lm.stats.reset()
        scores = lm.score(texts, by_steps=True)
        speeds.append(lm.stats.tokens_per_second)
    phase = lm.stats.decode
    counted = sum(score.tokens for score in scores)
    nats = -sum(score.logprob for score in scores) / counted
    needed = sum(phase.hits) + sum(phase.late_hits) + phase.absent
    return {
        "lossy": lm.stats.lossy,
        "nats": _report.rounded(nats),
        "nats_by_text": [_report.rounded(-score.logprob / score.tokens) for score in scores],
        "tokens_per_second": _report.spread(speeds),
        "bytes_per_token": _report.rounded(phase.bytes_moved / phase.tokens),
        "waiting": _report.rounded(phase.stall_seconds / phase.seconds),
        "absent_per_token": _report.rounded(phase.absent / phase.tokens),
        "experts_per_layer": _report.rounded(needed / (phase.tokens * layers)),
    }


def _print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"the bundled model, {100 * options.fraction:g} % of the experts cached, over {options.link}, prefetch "
        f"{options.prefetch}: {_DOMAINS} held-out texts of {options.tokens} tokens, decoded one by one"
    )
    lossless = rows[0]["tokens_per_second"]["median"]
    shown = [
        (
            row["option"],
            row["strength"],
            f"{row['nats']:.4f}",
            f"{row['cost_nats']:+.4f}",
            f"{math.exp(row['nats']):.2f}",
            f"{row['tokens_per_second']['median']:.1f}",
            f"{row['tokens_per_second']['median'] / lossless:.2f}",
            f"{row['bytes_per_token'] / 1e6:.3f}",
            f"{row['absent_per_token']:.2f}",
            f"{row['experts_per_layer']:.2f}",
            f"{100 * row['waiting']:.0f}",
        )
        for row in rows
    ]
    head = ["option", "", "nats", "cost", "perplexity", "tokens/s", "times", "MB/token", "absent/token", "experts"]
    print(_report.table([*head, "waiting %"], shown))


if __name__ == "__main__":
    sys.exit(_report.run("lossy", main))
