"""What `generate` and `trace` share: the options of a run, and a model that is loaded for it."""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ef_jax
from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.cli.distributed import is_first
from ef_jax.cli.prompts import Prompt, add_prompt_options, as_conversations
from ef_jax.cli.sampling_options import add_sampling_options, sampling_options
from ef_jax.memory.policies import POLICIES
from ef_jax.progress import Progress

_LARGEST_DEFAULT_BATCH = 8


class ModelRun(NamedTuple):
    """A loaded model and what it is to do; `chatty`: whether plan, progress and stats are shown on stderr."""

    lm: "ef_jax.LanguageModel"
    prompts: list[Prompt]
    sampling: "ef_jax.SamplingOptions"
    load_seconds: float
    chatty: bool

    def generate(self) -> "list[ef_jax.Generation]":
        """Continue the prompts behind a progress bar."""
        # Some tokens make no text of their own, so the bar may end early.
        total = len(self.prompts) * self.sampling.max_new_tokens
        with Progress(total, "pieces of text", "generating", enabled=None if self.chatty else False) as bar:
            return self.lm.generate(self.prompts, self.sampling, on_text=lambda index, piece: bar.update())

    def show_stats(self) -> None:
        """What the run took, if it is chatty; after everything on stdout."""
        if self.chatty:
            sys.stdout.flush()
            print(f"loaded in {self.load_seconds:.1f} s\n{self.lm.stats.table()}", file=sys.stderr)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Prompts, sampling, device memory, and how much is said."""
    add_prompt_options(parser)
    add_sampling_options(parser)
    common.add_memory_options(parser, batch="default: the number of prompts, 8 at most")
    parser.add_argument("--policy", choices=tuple(POLICIES), default="lru", help="who leaves the cache (default: lru)")
    common.add_prefetch_options(parser)
    common.add_lossy_options(parser)
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--quiet", action="store_true", help="no plan, progress and stats on a terminal")
    noise.add_argument("--verbose", action="store_true", help="plan and stats on stderr even if it is no terminal")
    common.add_common_options(parser)


def load_run(options: argparse.Namespace, path: Path, prompts: list[Prompt]) -> ModelRun:
    """Load the model at `path` for what `add_run_options` parsed.

    Whatever can be said about the input is said before the programs are compiled and the weights are read.

    Raises:
      InputError: an option, a prompt, the model or the budget cannot be used.
    """
    from ef_jax.inline_dispatch import dispatch_inline
    from ef_jax.text import require_tokenizer
    from ef_jax.weights import open_checkpoint

    dispatch_inline()
    with open_checkpoint(path, options.dtype) as checkpoint:
        sampling = sampling_options(options, checkpoint.generation_config)
        if options.chat:
            prompts = as_conversations(prompts, options.system, checkpoint.tokenizer_dir, checkpoint.spec.vocab)
        if checkpoint.tokenizer_dir is None and any(isinstance(prompt, str) for prompt in prompts):
            require_tokenizer(None)
    chatty = is_first(options) and (options.verbose or (sys.stderr.isatty() and not options.quiet))

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
            **common.prefetch_options(options),
            **common.lossy_options(options),
            **(common.mesh_options(options) if "mesh" in options else {}),
            kernel=options.kernel,
            copy_mode=options.copy_mode,
            progress=None if chatty else False,
            on_plan=show_plan,
        )
    return ModelRun(lm, prompts, sampling, time.perf_counter() - began, chatty)
