"""How far ahead are experts fetched, what does it save, what does it cost?

    python -m bench.horizon [TRACE] [--only stall rules need cost adaptation wall order device] [--plot DIR] [--save]

TRACE is a file of `ef-jax trace --pregate 6`, or of routing alone; without it the bundled model's own routing is
recorded on the spot, while it continues its held-out texts (sampled at temperature 1, seeded). The parts are described
at the head of their modules, `bench/_horizon_*.py`:

stall: stalls over a grid of links and caches, in replays. The first sequences of the trace, cut to `--tokens`.
rules: rules for candidates against one another, in replays.
need: estimates of how many blocks layers fetch: the running mean, batch size, diversity, cumulative probability.
cost: host time of prediction and planning, for a layer of 48 x 128 experts, top-8.
adaptation: horizons while the bandwidth is cut to a quarter and restored.
wall: decoding over emulated links, by the clock on the wall.
order: rows of resident experts first.
device: what looking ahead adds to a layer's program.

Prints tables, then one line of JSON. With --plot, pictures are drawn into a directory.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import _models, _report
from ef_jax.inline_dispatch import dispatch_inline
from ef_jax.replay.trace import RoutingTrace

_PROMPT_TOKENS, _SAMPLED = 32, 256


def main() -> int:
    """Run the bench; the exit code."""
    dispatch_inline()
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "stall": _stall,
        "rules": _rules,
        "need": _need,
        "cost": _cost,
        "adaptation": _adaptation,
        "wall": _wall,
        "order": _order,
        "device": _device,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="routing trace (default: the bundled model's own)")
    parser.add_argument("--only", nargs="+", choices=tuple(parts), default=list(parts), metavar="PART")
    parser.add_argument("--sequences", type=_report.positive, default=4, help="of the trace, in replays; one teaches")
    parser.add_argument("--tokens", type=_report.positive, default=96, help="of each of these, at most")
    parser.add_argument("--first", type=int, default=0, help="the first of these (default: 0)")
    parser.add_argument("--policy", default="lru", help="of the cache, in replays (default: lru)")
    parser.add_argument("--repeats", type=_report.positive, default=5, help="of what is timed")
    parser.add_argument("--trained", type=Path, help="a predictor of the bundled model, for stall and wall")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into a directory")
    _report.add_save_option(parser, "horizon")
    options = parser.parse_args()
    whole = RoutingTrace.load(options.trace) if options.trace else _record(max(options.sequences, 8))
    options.whole = whole
    options.routing = cut(whole.select(options.first, options.first + options.sequences), options.tokens)
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
    print(f"{whole!r}; replays take {options.routing.sequences} sequences, {options.routing.count} tokens\n")
    result: dict[str, Any] = {"trace": repr(whole)}
    for part in options.only:
        result[part] = parts[part](options)
    _report.finish("horizon", result, options.save)
    return 0


def cut(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The first `tokens` tokens of every sequence."""
    lengths = np.minimum(np.diff(trace.offsets), tokens)
    parts = [np.arange(first, first + length) for first, length in zip(trace.offsets.tolist(), lengths, strict=False)]
    rows = np.concatenate(parts)
    return RoutingTrace(
        experts=trace.experts[rows],
        tokens=trace.tokens[rows],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_experts=trace.num_experts,
        phases=trace.phases[rows],
        model=trace.model,
        pregate=None if trace.pregate is None else trace.pregate[rows],
    )


def _picture(options: argparse.Namespace, name: str) -> Path | None:
    return None if options.plot is None else options.plot / f"horizon_{name}.png"


def _stall(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_stall

    corrected = None if options.trained is None else _corrected(options.trained, options.routing)
    return _horizon_stall.run(
        options.routing, policy=options.policy, corrected=corrected, picture=_picture(options, "stall")
    )


def _corrected(trained: Path, trace: RoutingTrace) -> np.ndarray:
    """The bins of a predictor that was trained for the bundled model."""
    from ef_jax.loading import bundled_model
    from ef_jax.predict.correction_bins import correction_bins
    from ef_jax.predict.fingerprint import model_fingerprint
    from ef_jax.predict.predictor_file import load_predictor
    from ef_jax.weights import open_checkpoint

    with open_checkpoint(bundled_model()) as checkpoint:
        correction, _ = load_predictor(trained, checkpoint.spec, model_fingerprint(checkpoint.spec, checkpoint.dense()))
    return correction_bins(correction, trace)


def _rules(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_rules

    return _horizon_rules.run(options.routing, policy=options.policy)


def _need(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_need

    return _horizon_need.run(options.whole)


def _cost(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_cost

    return _horizon_cost.run(options.repeats)


def _adaptation(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_adaptation

    return _horizon_adaptation.run(options.whole, picture=_picture(options, "adaptation"))


def _wall(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_wall

    return _horizon_wall.run(options.repeats, trained=options.trained)


def _order(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_order

    return _horizon_order.run(options.repeats)


def _device(options: argparse.Namespace) -> dict[str, Any]:
    from bench import _horizon_device

    return _horizon_device.run(options.repeats)


def _record(sequences: int) -> RoutingTrace:
    """The bundled model's routing and pre-gate scores while it continues its held-out texts."""
    import ef_jax

    lm = ef_jax.load(expert_fraction=1.0, batch=8, context=_PROMPT_TOKENS + _SAMPLED, prefetch="off", progress=False)
    prompts = _models.prompts(lm, sequences, _PROMPT_TOKENS)
    with lm.trace(pregate=6) as recording:
        lm.generate(prompts, max_new_tokens=_SAMPLED, temperature=1.0, seed=0, ignore_eos=True)
    return recording.trace()


if __name__ == "__main__":
    sys.exit(_report.run("horizon", main))
