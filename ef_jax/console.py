"""What every command of ours does the same way: errors in one line, exit codes, strict JSON, a status on a terminal."""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ef_jax.errors import InputError, LinkError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
BROKEN_PIPE = 141

_LONGEST_MESSAGE = 600


class Parser(argparse.ArgumentParser):
    """Reports a usage error like any other bad input, and takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message} (see {self.prog} --help)")


def run(
    program: str,
    body: Callable[[], None],
    *,
    debug: bool,
    interrupted: str = "interrupted",
    out_of_memory: str = "out of memory",
) -> int:
    """Run a command and turn what it raises into one line on stderr and an exit code.

    Args:
      program: the command's name, which begins the line.
      body: the command.
      debug: print the traceback of an error first.
      interrupted: what to say after an interrupt.
      out_of_memory: what to say when memory ran out.

    Returns:
      0; 2 for bad input; 1 if memory or the output ran out, or for a defect of ours; 130 if interrupted; 141 if the
      reader of stdout went away, which is not reported.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write, and paths hold, characters that not every terminal's encoding has.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        body()
        sys.stdout.flush()
    except InputError as error:
        return _fail(program, f"error: {error}", BAD_INPUT, debug)
    except LinkError as error:
        return _fail(program, f"error: {error}", FAILED, debug)
    except KeyboardInterrupt:
        return _fail(program, interrupted, INTERRUPTED, debug)
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        _drop_stdout()
        return _fail(program, f"error: {error}", FAILED, debug)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _fail(program, f"error: {out_of_memory} (--debug shows where)", FAILED, debug)
        return _fail(program, f"defect: {type(error).__name__}: {error} (--debug shows where)", FAILED, debug)
    return 0


def json_line(value: Any) -> str:
    """`value` as one line of strict JSON; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), allow_nan=False)


@contextlib.contextmanager
def status(text: str, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show `text` on a terminal's stderr until the block ends or the yielded function is called."""
    visible = shown and sys.stderr.isatty()

    def clear() -> None:
        nonlocal visible
        if visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        visible = False

    if visible:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield clear
    finally:
        clear()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(program: str, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    if len(line) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    print(f"{program}: {line}", file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter's last flush cannot fail too."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
