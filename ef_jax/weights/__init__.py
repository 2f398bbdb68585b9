"""Checkpoints on disk: Hugging Face directories and our own converted ones, behind one interface."""

from pathlib import Path

from ef_jax.errors import CheckpointError
from ef_jax.weights.checkpoint import Checkpoint as Checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint
from ef_jax.weights.dtypes import check_dtype_name
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from ef_jax.weights.manifest import is_converted


def open_checkpoint(path: str | Path, dtype: str | None = None) -> Checkpoint:
    """The checkpoint in the directory `path`, with its structure checked and its weights not read yet.

    Args:
      path: a Hugging Face model directory (config.json and safetensors) or a converted checkpoint.
      dtype: "bfloat16", "float16" or "float32" converts weights while they are read (Hugging Face only). None hands
        them out as stored, and demands that all of them are stored in the dtype that config.json names. FP8 experts
        with a scale for 128 x 128 weights stay FP8 where no dtype is given; all other FP8 weights are handed out in the
        one or the other dtype. MXFP4 experts stay as they are, and only their biases and the dense arrays have a dtype.

    Raises:
      CheckpointError: something is missing, truncated, unexpected or malformed.
      UnsupportedError: the config asks for something that is not implemented.
    """
    directory = Path(path)
    name = check_dtype_name(dtype) if dtype is not None else None
    try:
        exists, is_directory = directory.exists(), directory.is_dir()
    except OSError as error:
        raise CheckpointError(f"cannot open {str(path)!r:.200}: {error.strerror}") from None
    if not exists:
        raise CheckpointError(f"there is no directory {str(path)!r}: download the checkpoint first, then give its path")
    if not is_directory:
        raise CheckpointError(f"{str(path)!r} is a file: give the directory that holds config.json and the weights")
    if is_converted(directory):
        return ConvertedCheckpoint(directory, name)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{str(path)!r} holds neither config.json nor manifest.json: it is not a checkpoint")
    return HuggingFaceCheckpoint(directory, name)
