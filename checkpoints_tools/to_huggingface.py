"""Our converted checkpoint -> Hugging Face: the same files, names and bytes that it was made from."""

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints_tools.destination import check_new, staged
from ef_jax.errors import CheckpointError, UnsupportedError
from ef_jax.families import FP8_AS_RELEASED
from ef_jax.progress import Progress
from ef_jax.weights.converted import SOURCE, ConvertedCheckpoint
from ef_jax.weights.directory import CARRIED_FILES, INDEX_FILE, plain_file_name, read_json_object, read_text_file
from ef_jax.weights.dtypes import STORED_DTYPES, as_bits, as_bytes, holds_exactly
from ef_jax.weights.fp8 import FP8_CODE, SCALE_DTYPES, quantize
from ef_jax.weights.huggingface import copy_rows
from ef_jax.weights.layout import FP8_SCALES, Piece
from ef_jax.weights.manifest import HEADERS_FILE
from ef_jax.weights.mxfp4 import unpack
from ef_jax.weights.safetensors import TensorEntry, parse_header

_Key = str | tuple[int, int]


def convert_to_huggingface(source: ConvertedCheckpoint, destination: Path, show_progress: bool | None = None) -> None:
    """Write the Hugging Face checkpoint that `source` was made from to the new directory `destination`.

    Args:
      source: an open converted checkpoint.
      destination: must not exist.
      show_progress: draw a progress bar; None does so on a terminal.

    Raises:
      CheckpointError: the source cannot be read or is inconsistent.
      UnsupportedError: its experts were quantized.
      InputError: the destination cannot be used or written. Either way nothing is left of it.
    """
    if source.manifest.quantization is not None:
        raise UnsupportedError(
            f"the experts of {str(source.path)!r} were quantized to {source.manifest.quantization}, from which there is"
            f" no way back: use the original"
        )
    directory = source.path / SOURCE
    headers = _headers(directory / HEADERS_FILE)
    tensors = {name: parse_header(header, f"{HEADERS_FILE}: {name}") for name, header in headers.items()}
    stored = {tensor: entry for file in tensors.values() for tensor, entry in file.items()}
    _check_tensors(source, stored)
    check_new(destination, source.nbytes + sum(map(len, headers.values())))
    origin = _Origin(source, stored)
    with (
        Progress(source.nbytes, "B", "writing", enabled=show_progress) as progress,
        staged(destination) as stage,
    ):
        for name in (*CARRIED_FILES, INDEX_FILE):
            if (directory / name).exists():
                (stage / name).write_bytes(read_text_file(directory / name))
        for name, header in headers.items():
            with open(stage / name, "wb") as file:
                _write_file(file, header, tensors[name], origin, progress)


def _write_file(
    file: BinaryIO, header: bytes, tensors: dict[str, TensorEntry], origin: "_Origin", progress: Progress
) -> None:
    file.write(struct.pack("<Q", len(header)))
    file.write(header)
    for name in tensors:
        for part in origin.parts(name):
            file.write(as_bytes(part))
            progress.update(part.nbytes)


class _Origin:
    """Where each Hugging Face tensor's bytes are in a converted checkpoint."""

    def __init__(self, source: ConvertedCheckpoint, stored: dict[str, TensorEntry]) -> None:
        self._source, self._stored = source, stored
        self._pieces: dict[str, list[tuple[Piece, _Key]]] = defaultdict(list)
        layout, spec = source.layout, source.spec
        for name, array in layout.dense.items():
            for piece in array.pieces:
                self._pieces[piece.tensor].append((piece, name))
        for layer in spec.moe_layers:
            for expert in range(spec.experts.count):
                for piece in layout.block(layer, expert):
                    self._pieces[piece.tensor].append((piece, (layer, expert)))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda found: found[0].start)
        if spec.tie_embeddings:
            self._pieces["lm_head.weight"] = self._pieces[_embedding(source)]
        self._block = np.empty(spec.block_format.shape, spec.block_format.dtype)
        self._block_key: tuple[int, int] | None = None
        self._dense: dict[str, np.ndarray] = {}

    def parts(self, tensor: str) -> Iterator[np.ndarray]:
        """The tensor's bytes as stored, as contiguous arrays in order; each is valid until the next."""
        if tensor in self._source.manifest.extra:
            yield self._source.read_extra(tensor)
            return
        pieces = self._pieces[tensor]
        needed = {key for _, key in pieces}
        self._dense = {name: array for name, array in self._dense.items() if name in needed}
        for piece, key in pieces:
            view = piece.view(self._source.spec.block_format.place(self._array(key), piece.parts))
            if piece.codes is not None:
                part = np.empty(piece.shape, np.uint8)
                unpack(piece.codes, view, part)
                yield part
                continue
            if piece.dtype == "uint8":
                view = as_bits(view)
            if piece.axes is not None:
                part = np.empty(piece.shape, view.dtype)
                copy_rows(view, part)
                view = part
            code = self._stored[tensor].dtype
            if code == FP8_CODE and piece.dtype is None:
                first_row = piece.start // self._stored[tensor].shape[1]
                yield quantize(view, self._scales(tensor), FP8_AS_RELEASED, first_row)
            else:
                yield view.astype(STORED_DTYPES[code], copy=False)

    def _scales(self, tensor: str) -> np.ndarray:
        entry = self._stored[tensor + FP8_SCALES]
        stored = self._source.read_extra(tensor + FP8_SCALES).view(SCALE_DTYPES[entry.dtype])
        return stored.astype(np.float32).reshape(entry.shape)

    def _array(self, key: _Key) -> np.ndarray:
        # A file names an expert's three tensors in a row, as it does those of a fused array, so that holding what the
        # last tensor was made of saves most reads.
        if isinstance(key, str):
            if key not in self._dense:
                self._dense[key] = self._source.read_dense(key)
            return self._dense[key]
        if key != self._block_key:
            self._block_key = None
            self._source.read_block(*key, self._block)
            self._block_key = key
        return self._block


def _embedding(source: ConvertedCheckpoint) -> str:
    """The tensor that a tied head is a copy of."""
    return source.layout.dense["embed.weight"].pieces[0].tensor


def _headers(path: Path) -> dict[str, bytes]:
    headers = read_json_object(path)
    for name, text in headers.items():
        if not plain_file_name(name) or not name.endswith(".safetensors") or not isinstance(text, str):
            raise CheckpointError(f"{str(path)!r} holds {name!r:.120}, which is not the header of a .safetensors file")
    return {name: text.encode(errors="surrogatepass") for name, text in headers.items()}


def _check_tensors(source: ConvertedCheckpoint, stored: dict[str, TensorEntry]) -> None:
    """Refuse headers that do not describe exactly the arrays that the checkpoint holds."""
    dtype = source.spec.dtype
    expected = source.layout.tensors()
    if source.spec.tie_embeddings and "lm_head.weight" in stored:
        expected["lm_head.weight"] = expected[_embedding(source)]
    extra = source.manifest.extra
    weights = {name: entry for name, entry in stored.items() if name not in extra}
    buffers = {name: entry for name, entry in stored.items() if name in extra}
    fits = weights.keys() == expected.keys() and all(
        entry.shape == expected[name].shape
        and (
            holds_exactly(expected[name].dtype or dtype, entry.dtype, widens=expected[name].dtype is not None)
            or _is_fp8(entry, buffers.get(name + FP8_SCALES))
        )
        for name, entry in weights.items()
    )
    if not fits or {name: entry.nbytes for name, entry in buffers.items()} != extra:
        raise CheckpointError(f"{str(source.path)!r}: {SOURCE}/{HEADERS_FILE} and source/config.json disagree")


def _is_fp8(weight: TensorEntry, scales: TensorEntry | None) -> bool:
    """Whether a weight is FP8 that is held as floats, with its scales beside it."""
    if weight.dtype != FP8_CODE or scales is None or len(weight.shape) != 2:
        return False
    return scales.dtype in SCALE_DTYPES and scales.shape == FP8_AS_RELEASED.scales_of(weight.shape)
