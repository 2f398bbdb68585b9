"""`ef-jax train-predictor`: teach a correction of pre-gate scores from recorded routing."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.errors import InputError
from ef_jax.memory.sizes import format_bytes
from ef_jax.progress import Progress
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.trace_file import load_trace
from ef_jax.spec import ModelSpec

if TYPE_CHECKING:
    from ef_jax.predict.training import Evaluation, Training

_DESCRIPTION = """Train a small network that corrects pre-gate scores: it says which experts the coming layers will
use, from the scores of the routers ahead, the token, the experts of its past layers and those of earlier tokens. Traces
must hold pre-gate scores (ef-jax trace --pregate 6); some sequences are held out, and recall is measured on them.
Training stops when their loss no longer falls. The predictor is for this model only."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the model, a trace or the output cannot be used.
    """
    options = build_parser().parse_args(words)
    # What is slow to import waits until the options are known to be good.
    from ef_jax.predict.predictor_file import check_new_predictor, save_predictor

    check_new_predictor(options.output, overwrite=options.overwrite)
    path = common.model_path(None if options.model == "-" else options.model)
    spec = common.read_spec(path, None)
    traces = [_read_trace(name, spec) for name in options.traces]

    from ef_jax.nn.correction import CorrectionSpec
    from ef_jax.predict.training import TrainingOptions, train
    from ef_jax.predict.training_data import Examples

    examples = Examples(traces)
    settings = TrainingOptions(epochs=options.epochs, steps=options.steps, seed=options.seed)
    fingerprint = _fingerprint(path)
    for name, trace in zip(options.traces, traces, strict=True):
        if trace.fingerprint not in ("", fingerprint):
            raise InputError(
                f"{name!r:.200} was recorded from a model with other routers: record one from {str(path)!r}"
            )
    assert traces[0].pregate is not None
    sizes = CorrectionSpec(
        layers=traces[0].layers,
        experts=traces[0].num_experts,
        top_k=traces[0].top_k,
        distances=traces[0].pregate.shape[2],
        vocab=spec.vocab,
        width=options.width,
    )
    with contextlib.ExitStack() as stack:
        progress: Progress | None = None

        def report(done: int, steps: int, seen: "Evaluation") -> None:
            nonlocal progress
            if progress is None:
                shown = False if options.json else None
                progress = stack.enter_context(Progress(steps, "steps", "training", enabled=shown))
            progress.update(1, f"loss {seen.loss:.4f}, recall {100 * np.nanmean(seen.recall):.1f} %")

        correction, training = train(sizes, examples, settings, report)
    summary = _summary(training)
    model = path.resolve().name
    save_predictor(
        options.output,
        correction,
        fingerprint=fingerprint,
        model=model,
        training=summary | {"seed": options.seed},
        overwrite=options.overwrite,
    )
    stored = sum(file.stat().st_size for file in Path(options.output).rglob("*") if file.is_file())
    if options.json:
        contents = {"predictor": options.output, "model": model, "stored_bytes": stored, "width": options.width}
        print(console.json_line(contents | summary))
        return
    print(_table(summary))
    print(
        f"{options.output}: trained on {training.tokens} tokens in {training.steps} steps and "
        f"{training.seconds:.3g} s, {format_bytes(stored)}"
    )


def build_parser() -> console.Parser:
    """The command's options."""
    parser = console.Parser(
        prog="ef-jax train-predictor",
        usage="ef-jax train-predictor MODEL TRACE ... -o PREDICTOR [option ...]",
        description=_DESCRIPTION,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory; - is the bundled model")
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="routing of this model, with pre-gate scores")
    parser.add_argument("-o", "--output", required=True, metavar="PREDICTOR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a predictor that is there")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=_positive,
        metavar="X",
        help="times through the tokens, at most (default: 4, and 400 steps at least)",
    )
    length.add_argument("--steps", type=common.whole_number(1), metavar="N", help="instead: steps of 512 tokens")
    parser.add_argument(
        "--width", type=common.whole_number(1), default=64, metavar="N", help="hidden units a layer (default: 64)"
    )
    parser.add_argument("--seed", type=common.whole_number(0), default=0, metavar="N", help="default: 0")
    common.add_common_options(parser)
    return parser


def _read_trace(name: str, spec: ModelSpec) -> RoutingTrace:
    """A trace that could be of the model."""
    trace = load_trace(name)
    if trace.pregate is None:
        raise InputError(f"{name!r:.200} has no pre-gate scores: record it with ef-jax trace --pregate 6")
    for what, found, wanted in (
        ("MoE layers", trace.layers, len(spec.moe_layers)),
        ("experts a layer", trace.num_experts, spec.experts.count),
        ("experts a token", trace.top_k, spec.experts.top_k),
    ):
        if found != wanted:
            raise InputError(f"{name!r:.200} is of another model: it has {found} {what}, MODEL has {wanted}")
    outside = trace.tokens[(trace.tokens < 0) | (trace.tokens >= spec.vocab)]
    if outside.size:
        raise InputError(
            f"{name!r:.200} is of another model: it has token {outside[0]}, MODEL a vocabulary of {spec.vocab}"
        )
    return trace


def _fingerprint(path: Path) -> str:
    from ef_jax.predict.fingerprint import model_fingerprint
    from ef_jax.weights import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return model_fingerprint(checkpoint.spec, checkpoint.dense())


def _summary(training: "Training") -> dict[str, Any]:
    """A training as JSON; recall by distance, mean over the layers."""
    before, after = (
        [float(f"{np.nanmean(column):.6g}") for column in recall.T]
        for recall in (training.recall_before, training.recall_after)
    )
    return {
        "tokens": training.tokens,
        "held_out_tokens": training.held_out_tokens,
        "steps": training.steps,
        "seconds": round(training.seconds, 3),
        "loss": training.loss,
        "recall_before": before,
        "recall_after": after,
    }


def _table(summary: dict[str, Any]) -> str:
    head = f"recall % by layers ahead, {summary['held_out_tokens']} tokens held out"
    rows = [
        (head, [str(distance) for distance in range(1, len(summary["recall_before"]) + 1)]),
        *(
            (name, [f"{100 * value:.1f}" for value in summary[key]])
            for name, key in (("pre-gate", "recall_before"), ("corrected", "recall_after"))
        ),
    ]
    return "\n".join(name.ljust(len(head)) + "".join(text.rjust(7) for text in texts) for name, texts in rows)


def _positive(text: str) -> float:
    value = common.number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r:.60}")
    return value
