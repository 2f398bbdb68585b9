"""Text to token ids and back, by the tokenizer files of a checkpoint directory."""

import gc
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ef_jax.errors import CheckpointError, InputError
from ef_jax.text.stream_decoder import StreamDecoder

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """A checkpoint's own tokenizer, as transformers runs it, from local files only and without code of its own."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers `PreTrainedTokenizerBase`; `load` makes one from a directory."""
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)

    @classmethod
    def load(cls, directory: Path, vocab: int) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory; None where it has none.

        Args:
          directory: a Hugging Face directory, or a converted checkpoint's.
          vocab: the model's vocabulary size, V.

        Raises:
          CheckpointError: the files are broken, need code of their own, or make ids that the model does not have.
        """
        if not any((directory / name).is_file() for name in _FILES):
            return None
        try:
            tokenizer = _auto_tokenizer().from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a broken tokenizer.json
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {reason[:300]}") from error
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest < 0:
            raise CheckpointError(f"the tokenizer in {directory} has no tokens: its vocabulary file is missing")
        if largest >= vocab:
            raise CheckpointError(
                f"the tokenizer in {directory} makes ids up to {largest} but the model's vocabulary ends at "
                f"{vocab - 1}: it belongs to another model"
            )
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens (a leading bos) that the tokenizer's own post-processor adds.

        Raises:
          InputError: the text holds a lone surrogate, which no UTF-8 text does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid text: {error.reason} at character {error.start}") from None
        # Not verbose: of texts too long for the model, whoever runs them says so.
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens. Spaces are never "cleaned up": streamed text could not follow."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def stream(self) -> StreamDecoder:
        """A decoder for one sequence that gives the same text as `decode`, token by token."""
        return StreamDecoder(self.decode, self._special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation by the tokenizer's chat template, ready for the assistant's answer.

        Args:
          messages: `{"role": ..., "content": ...}` each, as the template wants them.

        Raises:
          InputError: there is no chat template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise InputError("this checkpoint's tokenizer has no chat template: give the prompt as text instead")
        if not messages:
            raise InputError("the conversation is empty: give at least one message")
        for message in messages:
            if not {"role", "content"} <= message.keys():
                raise InputError(f"a message needs a 'role' and a 'content', got {dict(message)!r}")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except ImportError:
            raise InputError("chat templates need jinja2: run `pip install jinja2`") from None
        except Exception as error:  # a template raises whatever it likes
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses these messages: {reason[:300]}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """`tokenizer`, for a prompt given as text.

    Raises:
      InputError: the checkpoint has none.
    """
    if tokenizer is None:
        raise InputError("this checkpoint has no tokenizer, so text prompts cannot be read: give token ids instead")
    return tokenizer


def _auto_tokenizer() -> Any:
    """transformers' AutoTokenizer; importing it takes one to three seconds, so that is left to whoever needs it."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_no_record)  # importing it advises installing PyTorch, which is not needed here
    first = "transformers" not in sys.modules
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(_no_record)
    if first:
        # It leaves exceptions behind in reference cycles, and those the frames of all callers: a model that one of
        # them then loads would keep its device memory when it is deleted.
        gc.collect()
    return AutoTokenizer


def _no_record(record: logging.LogRecord) -> bool:
    return False
