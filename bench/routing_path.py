"""What is predicted from token ids alone, before a token's first layer runs, and what is that worth to a cache?

    python -m bench.routing_path [--trace TRACE.npz] [--only prediction cache] [--epochs 12] [--save]
    python -m bench.routing_path --only cache --trace TRACE.npz --paths BINS.npy --residency 0.25

prediction: recall of the K and 1.5 K likeliest experts of a layer (for a batch: union of candidates against union of
  uses), of a routing path trained by `ef-jax train-predictor --kind routing_path` and of cheaper predictors: "token-id
  table", the frequencies of each id's experts, backed off to those of the layer; "previous token", what the token
  before used; "history", `ef_jax.predict.History`. On a trace given with --trace, the first --fit sequences are learned
  from and the last --report ones reported. On the bundled model, what it samples and the first halves of its held-out
  texts are learned from, and the second halves reported, there also against the pre-gate by distance. What stops the
  training is a part of what it may learn from.
cache: what replays make of it, see `bench._routing_path_cache`.

Prints tables, then one line of JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import _report, _routing_path_cache, _routing_path_prediction
from bench._routing_path_data import Options
from ef_jax.inline_dispatch import dispatch_inline


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parts = {"prediction": _routing_path_prediction.run, "cache": _routing_path_cache.run}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--trace", type=Path, metavar="NPZ", help="a routing trace, besides the bundled model")
    parser.add_argument("--fit", type=_report.positive, default=300, help="sequences of the trace to learn from")
    parser.add_argument("--report", type=_report.positive, default=60, help="sequences at its end to report")
    parser.add_argument("--samples", type=_report.positive, default=384, help="sequences of 256 tokens to sample")
    parser.add_argument(
        "--paths", type=Path, metavar="NPY", help="part cache: predicted paths of the trace; nothing else"
    )
    parser.add_argument(
        "--residency", type=float, nargs="+", metavar="X", help="part cache: shares of experts in slots"
    )
    parser.add_argument("--epochs", type=float, default=12.0, help="of training")
    parser.add_argument("--width", type=_report.positive, default=64, help="of the routing path")
    parser.add_argument("--seed", type=int, default=0)
    _report.add_save_option(parser, "routing_path")
    options = parser.parse_args(namespace=Options())
    settings = ("fit", "report", "samples", "epochs", "width", "seed")
    result: dict[str, Any] = {name: getattr(options, name) for name in settings}
    for name in options.only:
        result[name] = parts[name](options)
        print()
    _report.finish("routing_path", result, options.save, packages=("optax",))
    return 0


if __name__ == "__main__":
    sys.exit(_report.run("routing_path", main))
