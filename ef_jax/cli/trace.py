"""`ef-jax trace`: record which experts a model uses, or import a recording."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.cli.distributed import add_process_options, is_first, join
from ef_jax.cli.model_run import add_run_options, load_run
from ef_jax.cli.prompts import read_prompts
from ef_jax.memory.sizes import format_bytes
from ef_jax.new_file import check_new_file
from ef_jax.replay.trace import PROMPT, RoutingTrace
from ef_jax.replay.trace_file import load_trace

_DESCRIPTION = """Continue prompts as `ef-jax generate` does, and record which experts every token used in every
layer, for `ef-jax replay`. A file that exists is not overwritten. With --import no model runs: a recording made
elsewhere is checked and written as a trace (see ef-jax trace --import --help)."""
_IMPORT_DESCRIPTION = """Check an npz file of experts [N, L, K], tokens [N], offsets [Q+1] and num_experts, and write
it as a trace. Every token counts as decoded."""
_USAGE = """ef-jax trace MODEL PROMPT ... -o FILE [option ...]
       ef-jax trace --import SRC -o FILE [--model NAME]"""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, a prompt, the model, the budget or a file cannot be used.
    """
    if any(word.partition("=")[0] == "--import" for word in words):
        _import(_import_parser().parse_args(words))
    else:
        _record(build_parser().parse_intermixed_args(words))


def _import(options: argparse.Namespace) -> None:
    check_new_file(options.output)
    trace = load_trace(options.source)
    if options.model is not None:
        trace = dataclasses.replace(trace, model=options.model)
    trace.save(options.output)
    _report(trace, options)


def _record(options: argparse.Namespace) -> None:
    prompts = read_prompts(options)
    check_new_file(options.output)
    path = common.model_path(None if options.model == "-" else options.model)
    if options.pregate:
        from ef_jax.runtime.pregate_probe import check_distances

        check_distances(common.read_spec(path, options.dtype), options.pregate)
    join(options, prompts)
    model_run = load_run(options, path, prompts)
    with model_run.lm.trace(weights=options.weights, pregate=options.pregate) as recording:
        model_run.generate()
    trace = recording.trace()
    if is_first(options):
        trace.save(options.output)
        _report(trace, options, stats=model_run.lm.stats.as_dict(), load_seconds=model_run.load_seconds)
    model_run.show_stats()


def _report(trace: RoutingTrace, options: argparse.Namespace, **measured: Any) -> None:
    stored = Path(options.output).stat().st_size
    prompt_tokens = int((trace.phases == PROMPT).sum())
    if options.json:
        contents = {
            "trace": options.output,
            "stored_bytes": stored,
            "model": trace.model,
            "sequences": trace.sequences,
            "tokens": trace.count,
            "prompt_tokens": prompt_tokens,
            "moe_layers": trace.layers,
            "experts_per_layer": trace.num_experts,
            "experts_per_token": trace.top_k,
            "weights": trace.weights is not None,
            "lossy": trace.lossy or None,
            "pregate": 0 if trace.pregate is None else trace.pregate.shape[2],
        }
        print(console.json_line(contents | measured))
        return
    print(
        f"{options.output}: {trace.sequences} sequences, {trace.count} tokens ({prompt_tokens} of prompts), "
        f"{trace.layers} layers of {trace.num_experts} experts, {trace.top_k} a token, {format_bytes(stored)}"
        + (f", lossy: {trace.lossy}" if trace.lossy else "")
    )


def build_parser() -> console.Parser:
    """The command's options, but for those of --import."""
    parser = console.Parser(prog="ef-jax trace", usage=_USAGE, description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory; - is the bundled model")
    _add_output(parser)
    parser.add_argument("--weights", action="store_true", help="record the router's weights too, as float16")
    parser.add_argument(
        "--pregate",
        type=common.whole_number(0),
        default=0,
        metavar="H",
        help="record what the routers of the next H layers say of each layer's input too, as float16 (for predictors)",
    )
    add_run_options(parser)
    common.add_mesh_options(parser)
    add_process_options(parser)
    return parser


def _import_parser() -> console.Parser:
    parser = console.Parser(prog="ef-jax trace --import", description=_IMPORT_DESCRIPTION)
    parser.add_argument("--import", dest="source", required=True, metavar="SRC", help="npz file to read")
    _add_output(parser)
    parser.add_argument("--model", metavar="NAME", help="name of the model, to be noted in the trace")
    common.add_common_options(parser)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="trace to write, an npz file")
