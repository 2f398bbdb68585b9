"""`ef-jax train-predictor`: teach a predictor of experts from recorded routing."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    from ef_jax.nn.correction import Correction
    from ef_jax.nn.routing_path import RoutingPath
    from ef_jax.predict.training import Training

_DESCRIPTION = """Train a small network that says which experts will be used, from recorded routing. Some sequences are
held out, recall is measured on them, and training stops when their loss no longer falls. A "correction" improves
pre-gate scores of the coming layers, which traces must hold (ef-jax trace --pregate 6), by the token, the experts of
its past layers and those of earlier tokens. A "routing_path" tells a token's experts in all layers at once, from token
ids alone. The predictor is for this model only."""
_WIDTH, _HEADS = 64, 4


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the model, a trace or the output cannot be used.
    """
    options = build_parser().parse_args(words)
    _check_options(options)
    # What is slow to import waits until the options are known to be good.
    from ef_jax.predict.predictor_file import check_new_predictor, save_predictor

    check_new_predictor(options.output, overwrite=options.overwrite)
    path = common.model_path(None if options.model == "-" else options.model)
    spec = common.read_spec(path, None)
    traces = [_read_trace(name, spec, options.kind) for name in options.traces]
    fingerprint = _fingerprint(path)
    for name, trace in zip(options.traces, traces, strict=True):
        if trace.fingerprint not in ("", fingerprint):
            raise InputError(
                f"{name!r:.200} was recorded from a model with other routers: record one from {str(path)!r}"
            )
    train = _train_routing_path if options.kind == "routing_path" else _train_correction
    predictor, summary, table = train(options, spec, traces)
    model = path.resolve().name
    save_predictor(
        options.output,
        predictor,
        fingerprint=fingerprint,
        model=model,
        training=summary | {"seed": options.seed},
        overwrite=options.overwrite,
    )
    _checkpoint(options).unlink(missing_ok=True)
    stored = sum(file.stat().st_size for file in Path(options.output).rglob("*") if file.is_file())
    if options.json:
        contents = {"predictor": options.output, "kind": options.kind, "model": model, "stored_bytes": stored}
        print(console.json_line(contents | summary))
        return
    print(table)
    print(
        f"{options.output}: trained on {summary['tokens']} tokens in {summary['steps']} steps and "
        f"{summary['seconds']:.3g} s, {format_bytes(stored)}"
    )


def _train_correction(
    options: argparse.Namespace, spec: ModelSpec, traces: list[RoutingTrace]
) -> tuple["Correction", dict[str, Any], str]:
    """The correction, its training as JSON, and as a table."""
    from ef_jax.nn.correction import CorrectionSpec
    from ef_jax.predict.training import Evaluation, TrainingOptions, train
    from ef_jax.predict.training_data import Examples

    examples = Examples(traces)
    settings = TrainingOptions(epochs=options.epochs, steps=options.steps, seed=options.seed)
    assert traces[0].pregate is not None
    sizes = CorrectionSpec(
        layers=traces[0].layers,
        experts=traces[0].num_experts,
        top_k=traces[0].top_k,
        distances=traces[0].pregate.shape[2],
        vocab=spec.vocab,
        width=options.width or _WIDTH,
    )
    with _progress(options) as show:

        def report(done: int, steps: int, seen: Evaluation) -> None:
            show(done, steps, f"loss {seen.loss:.4f}, recall {100 * np.nanmean(seen.recall):.1f} %")

        correction, training = train(sizes, examples, settings, report)
    summary = _correction_summary(training) | {"width": sizes.width}
    return correction, summary, _correction_table(summary)


def _train_routing_path(
    options: argparse.Namespace, spec: ModelSpec, traces: list[RoutingTrace]
) -> tuple["RoutingPath", dict[str, Any], str]:
    """The routing path, its training as JSON, and as a table."""
    from ef_jax.nn.routing_path import RoutingPathSpec
    from ef_jax.predict.path_data import PathExamples
    from ef_jax.predict.path_options import PathTrainingOptions
    from ef_jax.predict.path_training import PathLook, train_path

    examples = PathExamples(traces)
    settings = PathTrainingOptions(epochs=options.epochs, steps=options.steps, seed=options.seed)
    width = options.width or _WIDTH
    sizes = RoutingPathSpec(
        layers=traces[0].layers,
        experts=traces[0].num_experts,
        top_k=traces[0].top_k,
        vocab=spec.vocab,
        d_model=width,
        d_ff=4 * width,
    )
    with _progress(options) as show:

        def report(done: int, steps: int, seen: PathLook) -> None:
            show(done, steps, f"loss {seen.loss:.4f}, recall {100 * seen.recall.mean():.1f} %")

        routing_path, training = train_path(
            sizes, examples, settings, report, checkpoint=_checkpoint(options), resume=options.resume
        )
    summary = {
        "tokens": training.tokens,
        "held_out_tokens": training.held_out_tokens,
        "steps": training.steps,
        "seconds": round(training.seconds, 3),
        "loss": training.loss,
        "recall": [_rounded(float(value)) for value in training.recall],
        "width": width,
    }
    head = f"recall % of {sizes.top_k} candidates, {training.held_out_tokens} tokens held out"
    layers = " ".join(f"{100 * value:.1f}" for value in training.recall)
    return routing_path, summary, f"{head}  {100 * training.recall.mean():.1f}\nby layer  {layers}"


def _check_options(options: argparse.Namespace) -> None:
    if options.resume and options.kind != "routing_path":
        raise InputError("--resume is for --kind routing_path: a correction trains in one go")
    if options.kind == "routing_path" and options.width and options.width % _HEADS:
        raise InputError(f"--width must be a multiple of {_HEADS} for a routing path, got {options.width}")


def _checkpoint(options: argparse.Namespace) -> Path:
    """Where an interrupted training stands."""
    output = Path(options.output)
    return output.with_name(f"{output.name}.training.npz")


@contextlib.contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[int, int, str], None]]:
    """Shows steps done, of how many, and how it goes."""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        shown = 0

        def show(done: int, steps: int, note: str) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(Progress(steps, "steps", "training", enabled=False if options.json else None))
            bar.update(done - shown, note)
            shown = done

        yield show


def build_parser() -> console.Parser:
    """The command's options."""
    parser = console.Parser(
        prog="ef-jax train-predictor",
        usage="ef-jax train-predictor MODEL TRACE ... -o PREDICTOR [option ...]",
        description=_DESCRIPTION,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory; - is the bundled model")
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="routing of this model")
    parser.add_argument("-o", "--output", required=True, metavar="PREDICTOR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a predictor that is there")
    parser.add_argument(
        "--kind", choices=("correction", "routing_path"), default="correction", help="default: correction"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="of a routing path: go on from PREDICTOR.training.npz, same traces and options",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=_positive,
        metavar="X",
        help="times through the tokens, at most (default: 4, a routing path 12, and 400 steps at least)",
    )
    length.add_argument(
        "--steps", type=common.whole_number(1), metavar="N", help="instead: steps of 512 tokens, a routing path 1024"
    )
    parser.add_argument(
        "--width",
        type=common.whole_number(1),
        metavar="N",
        help=f"hidden units a layer; of a routing path, of its residual stream (default: {_WIDTH})",
    )
    parser.add_argument("--seed", type=common.whole_number(0), default=0, metavar="N", help="default: 0")
    common.add_common_options(parser)
    return parser


def _read_trace(name: str, spec: ModelSpec, kind: str) -> RoutingTrace:
    """A trace that could be of the model."""
    if spec.encodes:
        raise InputError(f"MODEL, a {spec.family}, has an encoder: predictors are trained of models without one")
    trace = load_trace(name)
    if trace.pregate is None and kind == "correction":
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


def _correction_summary(training: "Training") -> dict[str, Any]:
    """A training as JSON; recall by distance, mean over the layers."""
    before, after = (
        [_rounded(float(np.nanmean(column))) for column in recall.T]
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


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _correction_table(summary: dict[str, Any]) -> str:
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
