"""The prompts of a run: words of the command line, files, stdin, token ids, chat messages."""

import argparse
import re
import sys
from pathlib import Path

from ef_jax.errors import InputError

Prompt = str | list[int]


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Where prompts come from. They run in this order: arguments, files, token ids."""
    group = parser.add_argument_group("prompts")
    group.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue; - reads it from stdin")
    group.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a UTF-8 file to continue, without its last newline; repeatable",
    )
    group.add_argument(
        "--token-ids", action="append", default=[], metavar='"1,2,3"', help="a prompt as token ids; repeatable"
    )
    group.add_argument("--chat", action="store_true", help="each text is a user's message; use the chat template")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system's message before each")


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts that the options name, text as str and token ids as lists.

    Raises:
      InputError: there are none, one is empty or unreadable, or options contradict each other.
    """
    if options.system is not None and not options.chat:
        raise InputError("--system is the system's message of a chat: add --chat")
    if options.chat and options.token_ids:
        raise InputError("--chat makes prompts of text: give no --token-ids with it")
    if options.prompts.count("-") > 1:
        raise InputError("stdin is one prompt: give - once")
    texts = [_read_stdin() if text == "-" else text for text in options.prompts]
    texts += [_read_file(name) for name in options.prompt_file]
    if "" in texts:
        raise InputError("a prompt is empty: give at least one character")
    prompts: list[Prompt] = [*texts, *map(_parse_ids, options.token_ids)]
    if not prompts:
        raise InputError("there is no prompt: give text, - for stdin, --prompt-file or --token-ids")
    return prompts


def as_conversations(prompts: list[Prompt], system: str | None, tokenizer_dir: Path | None, vocab: int) -> list[Prompt]:
    """Each prompt as the token ids of a conversation in which the user says it.

    Args:
      prompts: texts.
      system: what the system says first, if anything.
      tokenizer_dir: where the checkpoint's tokenizer is, if anywhere.
      vocab: the model's vocabulary size, V.

    Raises:
      InputError: there is no tokenizer or chat template, or the template refuses the messages.
    """
    from ef_jax.text import Tokenizer, require_tokenizer

    tokenizer = require_tokenizer(Tokenizer.load(tokenizer_dir, vocab) if tokenizer_dir else None)
    first = [{"role": "system", "content": system}] if system is not None else []
    return [tokenizer.chat([*first, {"role": "user", "content": str(prompt)}]) for prompt in prompts]


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "stdin")


def _read_file(name: str) -> str:
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompt file {name!r}: {error.strerror}") from None
    return _decode(data, f"the prompt file {name!r}")


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _parse_ids(text: str) -> list[int]:
    if not re.fullmatch(r"\s*[0-9]{1,9}(\s*[,\s]\s*[0-9]{1,9})*\s*", text, re.ASCII):
        raise InputError(f"--token-ids takes numbers such as 1,2,3, got {text!r:.60}")
    return [int(word) for word in re.findall("[0-9]+", text)]
