"""What every checkpoint on disk offers, whatever its format."""

import abc
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from ef_jax.errors import CheckpointError, InputError
from ef_jax.spec import ModelSpec
from ef_jax.weights.dtypes import has_nonfinite
from ef_jax.weights.layout import Layout


class Checkpoint(abc.ABC):
    """A model's weights on disk, read array by array into memory that the caller owns.

    Attributes:
      path: the checkpoint's directory.
      format: "huggingface" or "converted".
      spec: the model, in the dtype that the weights are handed out in.
      layout: which Hugging Face tensors the arrays are made of.
      nbytes: bytes of all tensors on disk.
      tokenizer_dir: the directory that holds the tokenizer's files, or None if there are none.
      generation_config: fields of generation_config.json; empty if there is none.
    """

    path: Path
    format: Literal["huggingface", "converted"]
    spec: ModelSpec
    layout: Layout
    nbytes: int
    tokenizer_dir: Path | None
    generation_config: dict[str, Any]

    @abc.abstractmethod
    def dense(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every array that is not an expert block, as (our dotted name, array in our layout), in model order.

        Each array is new: the caller may keep it.

        Raises:
          CheckpointError: an array cannot be read, or holds NaN or infinity.
        """

    @abc.abstractmethod
    def read_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        """Fill `out` with one expert's block: gate, up, transposed down, or the parts that they are kept as.
        Thread-safe.

        Args:
          layer: decoder layer index, one of `spec.moe_layers`.
          expert: index below `spec.experts.count`.
          out: an array as `spec.block_format` says, C-contiguous: `[3, F, D]` of the spec's dtype, if nothing else.

        Raises:
          CheckpointError: the block cannot be read or, from a Hugging Face checkpoint, holds NaN or infinity.
          InputError: the indices or `out` do not fit the spec.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files; nothing can be read after it."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        if not 0 <= layer < len(self.spec.layers) or self.spec.layers[layer].ffn != "moe":
            raise InputError(f"layer {layer} has no experts; the layers that do are {self.spec.moe_layers}")
        if not 0 <= expert < self.spec.experts.count:
            raise InputError(f"expert {expert} is not below {self.spec.experts.count}")
        form = self.spec.block_format
        if out.shape != form.shape or out.dtype != form.dtype or not out.flags.c_contiguous:
            raise InputError(
                f"a block is a contiguous {form.dtype} array {list(form.shape)}, got {out.dtype} {list(out.shape)}"
            )


def check_finite(array: np.ndarray, what: str, path: Path) -> None:
    """Refuse an array that holds NaN or infinity; `what` names it.

    Raises:
      CheckpointError: it does.
    """
    if has_nonfinite(array):
        raise CheckpointError(f"{what} of {str(path)!r} holds NaN or infinite weights in {array.dtype.name}")


class Scratch(threading.local):
    """One reusable buffer a thread."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """The first `nbytes` of this thread's buffer, uint8; valid until the thread's next call."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]
