"""`ef-convert`: converts, inspects and verifies checkpoints."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.destination import remove
from checkpoints_tools.inspection import as_table, inspect
from checkpoints_tools.to_huggingface import convert_to_huggingface
from checkpoints_tools.to_orbax import convert_to_orbax
from checkpoints_tools.verification import verify
from ef_jax import console
from ef_jax.errors import CheckpointError, InputError
from ef_jax.weights import Checkpoint, open_checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint
from ef_jax.weights.dtypes import WEIGHT_DTYPES
from ef_jax.weights.huggingface import HuggingFaceCheckpoint

_DESCRIPTION = """Convert a Hugging Face MoE checkpoint to an Orbax checkpoint with one array an expert, and back.
A conversion that was interrupted goes on when the same command is run again."""

_EPILOG = """other forms:
  ef-convert inspect PATH [--verify] [--json]   print what is inside a checkpoint of either format
  ef-convert PATH --verify                      read every weight and compare it with its checksum"""

_INTERRUPTED = "interrupted: run the same command again to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ef-convert`; the exit code is that of `console.run`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return console.run("ef-convert", lambda: _run(words), debug="--debug" in words, interrupted=_INTERRUPTED)


def _run(words: list[str]) -> None:
    contents, as_json = _inspect(words[1:]) if words[:1] == ["inspect"] else _convert_or_verify(words)
    print(console.json_line(contents) if as_json else as_table(contents))


def _inspect(words: list[str]) -> tuple[dict[str, Any], bool]:
    options = _inspect_parser().parse_args(words)
    with open_checkpoint(options.path) as checkpoint:
        if options.verify:
            verify(checkpoint)
        return inspect(checkpoint) | ({"verified": True} if options.verify else {}), options.json


def _convert_or_verify(words: list[str]) -> tuple[dict[str, Any], bool]:
    # Plain parse_args would not take SRC --to huggingface DST.
    options = _convert_parser().parse_intermixed_args(words)
    start = time.monotonic()
    with open_checkpoint(options.source, options.dtype) as checkpoint:
        if options.destination is not None:
            contents = _convert(checkpoint, Path(options.destination), options)
        elif options.verify:
            verify(checkpoint)
            contents = {"path": str(checkpoint.path), "bytes": checkpoint.nbytes, "verified": True}
        else:
            raise InputError("a destination is missing: ef-convert SRC DST, or ef-convert PATH --verify")
    return contents | {"seconds": round(time.monotonic() - start, 3)}, options.json


def _convert(checkpoint: Checkpoint, destination: Path, options: argparse.Namespace) -> dict[str, Any]:
    if isinstance(checkpoint, HuggingFaceCheckpoint) and options.to in (None, "orbax"):
        _keep_off_accelerators()
        manifest = convert_to_orbax(
            checkpoint,
            destination,
            options.dtype,
            quantize=options.quantize,
            calibrate=_calibration(checkpoint, options),
        )
        dtype = None
    elif isinstance(checkpoint, ConvertedCheckpoint) and options.to == "huggingface":
        if options.quantize is not None:
            raise InputError(f"--quantize {options.quantize} is for conversions to orbax: leave it out")
        manifest = checkpoint.manifest
        dtype = None if manifest.experts == "fp8" else manifest.dtype
        convert_to_huggingface(checkpoint, destination)
    else:
        other = "huggingface" if checkpoint.format == "converted" else "orbax"
        raise InputError(f"{str(checkpoint.path)!r} is a {checkpoint.format} checkpoint: it converts --to {other}")
    with open_checkpoint(destination, dtype) as written:
        if options.verify:
            try:
                verify(written, manifest)
            except CheckpointError:
                remove(destination)
                raise
        return {
            "source": str(checkpoint.path),
            "destination": str(destination),
            "format": written.format,
            "family": written.spec.family,
            "dtype": written.spec.dtype,
            "experts_in": written.spec.block_dtype,
            "calibration_tokens": manifest.calibration_tokens,
            **_dequantized(checkpoint),
            "bytes": written.nbytes,
            "experts": written.spec.total_experts,
            "verified": options.verify,
        }


def _dequantized(checkpoint: Checkpoint) -> dict[str, str]:
    """What a conversion does beside reordering: FP8 weights become floats, and there is no way back to FP8."""
    if isinstance(checkpoint, HuggingFaceCheckpoint) and checkpoint.dequantizes:
        return {"dequantized": f"fp8 to {checkpoint.spec.dtype}"}
    return {}


def _calibration(checkpoint: Checkpoint, options: argparse.Namespace) -> list[int] | None:
    """The tokens of the text that was named to round by."""
    if options.calibrate is None:
        return None
    if options.quantize is None:
        raise InputError("--calibrate is for --quantize: give that too, or leave it out")
    from ef_jax.text import Tokenizer

    try:
        text = Path(options.calibrate).read_bytes().decode()
    except OSError as error:
        raise InputError(f"cannot read {options.calibrate!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{options.calibrate!r} is not text in UTF-8: give another file") from None
    directory = checkpoint.tokenizer_dir
    tokenizer = None if directory is None else Tokenizer.load(directory, checkpoint.spec.vocab)
    if tokenizer is None:
        raise InputError(f"{str(checkpoint.path)!r} has no tokenizer to read --calibrate with: leave that out")
    return list(tokenizer.encode(text))


def _keep_off_accelerators() -> None:
    """Orbax starts a JAX backend; arrays on the host need none that takes an accelerator's memory."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def _convert_parser() -> console.Parser:
    parser = console.Parser(prog="ef-convert", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, Hugging Face or converted")
    parser.add_argument("destination", metavar="DST", nargs="?", help="directory to write; must not exist")
    parser.add_argument("--to", choices=("orbax", "huggingface"), help="format to write (default: orbax)")
    parser.add_argument("--dtype", choices=tuple(WEIGHT_DTYPES), help="convert the weights (default: as stored)")
    parser.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="round the experts to int8, int4 (a scale for 32 weights) or for example int4:64; lossy, no way back",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="round by what the experts read of this text, in UTF-8, some ten thousand tokens (default: to nearest)",
    )
    _add_common(parser)
    return parser


def _inspect_parser() -> console.Parser:
    parser = console.Parser(prog="ef-convert inspect", description="Print what is inside a checkpoint.")
    parser.add_argument("path", metavar="PATH", help="checkpoint directory, Hugging Face or converted")
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="read every weight back and compare checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")


if __name__ == "__main__":
    sys.exit(main())
