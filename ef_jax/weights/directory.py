"""The small text files of a model directory: configuration, tokenizer, generation defaults. Never code."""

from pathlib import Path
from typing import Any

from ef_jax.errors import CheckpointError
from ef_jax.weights.safetensors import parse_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, "README.md", "LICENSE", "LICENSE.txt")
"""What a conversion carries along, where it exists."""

INDEX_FILE = "model.safetensors.index.json"
"""Which shard holds which tensor, where the weights are in shards."""

MAX_TEXT_BYTES = 1 << 28


def read_text_file(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
      CheckpointError: it cannot be read, or is too large to be what its name says.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{str(path)!r} has {path.stat().st_size} bytes; {MAX_TEXT_BYTES} is the most allowed"
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
      CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        value = parse_json(read_text_file(path))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} holds {type(value).__name__}, expected a JSON object")
    return value


def tokenizer_dir(directory: Path) -> Path | None:
    """The directory, if it holds a tokenizer's vocabulary."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return directory if any((directory / name).is_file() for name in vocabularies) else None


def plain_file_name(name: Any) -> bool:
    """Whether `name` is a file's name and nothing that leads to another directory."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )
