"""`ef-jax generate`: continue prompts."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import ef_jax
from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.cli.prompts import Prompt, add_prompt_options, as_conversations, read_prompts
from ef_jax.cli.sampling_options import add_sampling_options, sampling_options
from ef_jax.memory.policies import POLICIES
from ef_jax.progress import Progress

_LARGEST_DEFAULT_BATCH = 8

_DESCRIPTION = """Continue prompts. Text goes to stdout; on a terminal the memory plan, a progress bar and a table of
stats go to stderr. Decoding is greedy unless options say otherwise, so the same command gives the same text."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, a prompt, the model or the budget cannot be used.
    """
    options = build_parser().parse_intermixed_args(words)
    prompts = read_prompts(options)
    # Whatever can be said about the input is said before the programs are compiled and the weights are read.
    from ef_jax.inline_dispatch import dispatch_inline
    from ef_jax.text import require_tokenizer
    from ef_jax.weights import open_checkpoint

    dispatch_inline()
    path = common.model_path(options.model)
    with open_checkpoint(path, options.dtype) as checkpoint:
        sampling = sampling_options(options, checkpoint.generation_config)
        if options.chat:
            prompts = as_conversations(prompts, options.system, checkpoint.tokenizer_dir, checkpoint.spec.vocab)
        if checkpoint.tokenizer_dir is None and any(isinstance(prompt, str) for prompt in prompts):
            require_tokenizer(None)
    chatty = options.verbose or (sys.stderr.isatty() and not options.quiet)

    def show_plan(plan: "ef_jax.MemoryPlan") -> None:
        clear()
        if chatty:
            print(plan, file=sys.stderr, flush=True)

    began = time.perf_counter()
    with console.status("compiling ...", shown=chatty) as clear:
        lm = ef_jax.load(
            path,
            **common.memory_options(options, batch=min(len(prompts), _LARGEST_DEFAULT_BATCH)),
            dtype=options.dtype,
            policy=options.policy,
            copy_mode=options.copy_mode,
            progress=None if chatty else False,
            on_plan=show_plan,
        )
    load_seconds = time.perf_counter() - began
    results = _generate(lm, prompts, sampling, options, chatty)
    if options.json:
        print(console.json_line(_contents(lm, results, load_seconds)))
    if chatty:
        sys.stdout.flush()
        print(f"loaded in {load_seconds:.1f} s\n{lm.stats.table()}", file=sys.stderr)


def _generate(
    lm: "ef_jax.LanguageModel",
    prompts: list[Prompt],
    sampling: "ef_jax.SamplingOptions",
    options: argparse.Namespace,
    chatty: bool,
) -> "list[ef_jax.Generation]":
    """Generate and, without --json, print the text: of one prompt as it comes, of several when all are done."""
    if options.json or len(prompts) > 1:
        # Some tokens make no text of their own, so the bar may end early.
        total = len(prompts) * sampling.max_new_tokens
        with Progress(total, "pieces of text", "generating", enabled=None if chatty else False) as bar:
            results = lm.generate(prompts, sampling, on_text=lambda index, piece: bar.update())
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


def _contents(lm: "ef_jax.LanguageModel", results: "list[ef_jax.Generation]", load_seconds: float) -> dict[str, Any]:
    return {
        "text": [result.text for result in results],
        "tokens": [result.tokens for result in results],
        "finish_reason": [result.finish_reason for result in results],
        "logprobs": [result.logprobs for result in results],
        "model": str(lm.path),
        "plan": lm.plan.as_dict(),
        "stats": lm.stats.as_dict(),
        "load_seconds": load_seconds,
    }


def build_parser() -> console.Parser:
    """The command's options."""
    parser = console.Parser(prog="ef-jax generate", description=_DESCRIPTION)
    parser.add_argument("--model", metavar="PATH", help="checkpoint directory (default: the bundled model)")
    add_prompt_options(parser)
    add_sampling_options(parser)
    common.add_memory_options(parser, batch="default: the number of prompts, 8 at most")
    parser.add_argument("--policy", choices=tuple(POLICIES), default="lru", help="who leaves the cache (default: lru)")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--quiet", action="store_true", help="no plan, progress and stats on a terminal")
    noise.add_argument("--verbose", action="store_true", help="plan and stats on stderr even if it is no terminal")
    common.add_common_options(parser)
    return parser
