"""`--distributed`: a command that several processes run together, and that only the first of them prints for."""

import argparse
import json
import os
import sys

from ef_jax.cli.options import whole_number
from ef_jax.cli.prompts import Prompt
from ef_jax.errors import InputError

# What may differ between processes, or is compared as prompts.
_OWN = frozenset(
    {"coordinator", "process_id", "model", "timeline", "output", "prompts", "prompt_file", "token_ids", "placement"}
    | {"quiet", "verbose", "debug", "json"}
)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """The options of several processes."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="run on the devices of several processes, each started with the same command: under Slurm, Open MPI and "
        "the like with nothing more, else with these three or the variables JAX_COORDINATOR_ADDRESS, EF_JAX_PROCESSES "
        "and EF_JAX_PROCESS_ID. The first process prints; when one dies, all end, with exit code 70",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0's host")
    group.add_argument("--processes", type=whole_number(1), metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=whole_number(0), metavar="I", help="which one this is, from 0")


def join(options: argparse.Namespace, prompts: list[Prompt]) -> None:
    """Join the other processes, if options ask for it, and check that they were given the same.

    Raises:
      InputError: options that do not go together, or what `join_processes` and `same_everywhere` raise.
    """
    if not options.distributed:
        for name in ("coordinator", "processes", "process_id"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for several processes: give --distributed too")
        return
    if options.mesh is None:
        raise InputError("--distributed shares a model among devices of several processes: give --mesh too")
    from ef_jax.inline_dispatch import dispatch_inline
    from ef_jax.mesh.processes import join_processes, same_everywhere

    dispatch_inline()
    join_processes(options.coordinator, options.processes, options.process_id)
    _print_in_first_process(first=is_first(options))
    given = {name: value for name, value in vars(options).items() if name not in _OWN}
    values = {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in given.items()}
    same_everywhere({**values, "the prompts": json.dumps(prompts)})


def is_first(options: argparse.Namespace) -> bool:
    """Whether this process is the one that prints."""
    if not getattr(options, "distributed", False):
        return True
    import jax

    return jax.process_index() == 0


def _print_in_first_process(*, first: bool) -> None:
    """What Python prints goes to stdout in the first process, and nothing else does: libraries below greet there."""
    sys.stdout.flush()
    real, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    encoding = sys.stdout.encoding
    sys.stdout = open(real if first else nowhere, "w", encoding=encoding, errors="backslashreplace")  # noqa: SIM115
