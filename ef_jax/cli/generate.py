"""`ef-jax generate`: continue prompts."""

import argparse
from collections.abc import Sequence
from typing import Any

import ef_jax
from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.cli.distributed import add_process_options, is_first, join
from ef_jax.cli.model_run import ModelRun, add_run_options, load_run
from ef_jax.cli.prompts import read_prompts
from ef_jax.new_file import check_new_file

_DESCRIPTION = """Continue prompts. Text goes to stdout; on a terminal the memory plan, a progress bar and a table of
stats go to stderr. Decoding is greedy unless options say otherwise, so the same command gives the same text."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, a prompt, the model or the budget cannot be used.
    """
    options = build_parser().parse_intermixed_args(words)
    prompts = read_prompts(options)
    if options.timeline is not None:
        check_new_file(options.timeline)
    join(options, prompts)
    model_run = load_run(options, common.model_path(options.model), prompts)
    if options.timeline is None:
        results = _generate(model_run, options)
    else:
        with model_run.lm.timeline() as timeline:
            results = _generate(model_run, options)
        if is_first(options):
            timeline.save(options.timeline)
    if options.json:
        print(console.json_line(_contents(model_run, results)))
    model_run.show_stats()


def _generate(model_run: ModelRun, options: argparse.Namespace) -> "list[ef_jax.Generation]":
    """Generate and, without --json, print the text: of one prompt as it comes, of several when all are done."""
    lm, prompts, sampling = model_run.lm, model_run.prompts, model_run.sampling
    if options.json or len(prompts) > 1:
        results = model_run.generate()
        if not options.json:
            for number, result in enumerate(results, 1):
                print(f"==> prompt {number} of {len(results)} <==\n{_text(result)}")
        return results
    try:
        results = lm.generate(prompts, sampling, on_text=lambda index, piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print()
        raise
    print("" if results[0].text is not None else _text(results[0]))
    return results


def _text(result: "ef_jax.Generation") -> str:
    return ",".join(map(str, result.tokens)) if result.text is None else result.text


def _contents(model_run: ModelRun, results: "list[ef_jax.Generation]") -> dict[str, Any]:
    lm = model_run.lm
    return {
        "text": [result.text for result in results],
        "tokens": [result.tokens for result in results],
        "finish_reason": [result.finish_reason for result in results],
        "logprobs": [result.logprobs for result in results],
        "model": str(lm.path),
        "plan": lm.plan.as_dict(),
        "kernels": lm.kernels,
        "stats": lm.stats.as_dict(),
        "load_seconds": model_run.load_seconds,
    }


def build_parser() -> console.Parser:
    """The command's options."""
    parser = console.Parser(prog="ef-jax generate", description=_DESCRIPTION)
    parser.add_argument("--model", metavar="PATH", help="checkpoint directory (default: the bundled model)")
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="also write what ran when, as JSON for Perfetto (ui.perfetto.dev); a file that exists is not overwritten",
    )
    add_run_options(parser)
    common.add_mesh_options(parser)
    add_process_options(parser)
    return parser
