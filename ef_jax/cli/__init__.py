"""`ef-jax`: generate text, forecast memory and speed, say what a model is, record, replay and learn its routing."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from ef_jax import console
from ef_jax.errors import InputError

COMMANDS = {
    "generate": "continue prompts",
    "plan": "the memory plan of a model, without loading it",
    "info": "what a model is, and what it would run on",
    "doctor": "measure this machine once, for forecasts of speed",
    "trace": "record which experts a model uses",
    "replay": "which cache policy and how many slots suit recorded routing",
    "train-predictor": "train a correction of pre-gate scores on recorded routing",
}

_DESCRIPTION = "Run Mixture-of-Experts language models whose experts live in host memory."
_OUT_OF_MEMORY = "out of memory: give a smaller --device-memory, --context, --batch or --chunk"
_EPILOG = "commands (each has --help, --json and --debug):\n" + "\n".join(
    f"  {name:16} {summary}" for name, summary in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ef-jax`; the exit code is that of `console.run`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = console.run("ef-jax", lambda: _run_among(words), debug="--debug" in words, out_of_memory=_OUT_OF_MEMORY)
    if (processes := _processes()) is not None:
        processes.leave(code)
    return code


def _run_among(words: list[str]) -> None:
    """Run a command; what fails in it because another process is gone is not reported as its own."""
    try:
        _run(words)
    except BaseException as error:
        if (processes := _processes()) is not None:
            processes.explain(error)
        raise


def _processes() -> Any:
    """The module that joins processes, if a command has imported it."""
    return sys.modules.get("ef_jax.mesh.processes")


def _run(words: list[str]) -> None:
    parser = console.Parser(
        prog="ef-jax", usage="ef-jax COMMAND ... | --version | --help", description=_DESCRIPTION, epilog=_EPILOG
    )
    if not words:
        parser.print_help()
    elif words[0] in COMMANDS:
        # A command's module is imported when it runs, so that help and bad options need not wait for the others.
        importlib.import_module(f"ef_jax.cli.{words[0].replace('-', '_')}").run(words[1:])
    elif words[0].startswith("-"):
        parser.add_argument("--version", action="store_true", help="print the version")
        if parser.parse_args(words).version:
            print(f"ef-jax {_version()}")
    else:
        raise InputError(f"{words[0]!r} is not a command: choose {', '.join(COMMANDS)}")


def _version() -> str:
    try:
        return importlib.metadata.version("ef_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: running from the source tree)"
