"""Reads a Hugging Face model directory: config.json and safetensors, in one file or in shards."""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ef_jax.errors import CheckpointError
from ef_jax.weights.checkpoint import Checkpoint, Scratch, check_finite
from ef_jax.weights.directory import INDEX_FILE, plain_file_name, read_json_object, tokenizer_dir
from ef_jax.weights.dtypes import (
    DTYPE_OF_CODE,
    STORED_DTYPES,
    WEIGHT_DTYPES,
    DtypeName,
    as_bits,
    holds_exactly,
)
from ef_jax.weights.fp8 import FP8_CODE, SCALE_DTYPES, Fp8Weight, dequantize, fp8_weights, has_nan
from ef_jax.weights.layout import Expected, Layout, Piece, family_names, stored_experts
from ef_jax.weights.model_config import read_model_config, without_fp8
from ef_jax.weights.mxfp4 import pack
from ef_jax.weights.safetensors import SafetensorsFile, TensorEntry

_LOG = logging.getLogger("ef_jax")
_SINGLE = "model.safetensors"
_ROTARY_BUFFER = re.compile(r"model\.(layers\.[0-9]{1,6}\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_STRIP_BYTES = 4 << 20
# Rows of one cache line's bytes make the strided writes of a transpose fill whole lines: 5 GB/s, against 2.
_LINE_BYTES = 64


class HuggingFaceCheckpoint(Checkpoint):
    """A Hugging Face checkpoint (see `Checkpoint`).

    Attributes:
      files: the open safetensors files, by file name.
      extra: names of tensors that carry no weights of their own: rotary buffers, a tied head's copy, and where experts
        stay FP8, the scales of other FP8 weights.
      expected: the tensors that hold the model's weights, by name.
      unused: names of tensors of other parts of the model, which are not read: vision towers, heads for more tokens.
      fp8: the FP8 weights, by name, and their scales, that are handed out in the spec's dtype as other weights are: all
        but the experts where these stay FP8.
      left_out: names of tensors that a conversion does not have: unused ones, and scales of weights that were FP8.
    """

    format = "huggingface"

    def __init__(self, path: Path, dtype: DtypeName | None = None) -> None:
        """Open the directory `path` and check every tensor's name, shape and dtype.

        Args:
          path: the directory.
          dtype: convert weights to this; None demands that they are stored in the config's dtype.

        Raises:
          CheckpointError: something is missing, truncated, unexpected or malformed.
          UnsupportedError: the config asks for something that is not implemented.
        """
        self.path = path
        self.files: dict[str, SafetensorsFile] = {}
        self.spec, self.generation_config = read_model_config(path, dtype)
        self.tokenizer_dir = tokenizer_dir(path)
        self._scratch = Scratch()
        try:
            self._open_files()
            self._file_of = {name: file for file in self.files.values() for name in file.tensors}
            stored = {name: entry for file in self.files.values() for name, entry in file.tensors.items()}
            self.layout = self._find_layout(stored)
            self.spec = self.layout.spec
            self.expected = self.layout.tensors()
            in_fp8 = fp8_weights(read_json_object(path / "config.json"), self.expected, stored, path)
            self.fp8 = {name: weight for name, weight in in_fp8.items() if self.expected[name].dtype != "float8_e4m3fn"}
            scales = {weight.scales for weight in in_fp8.values()}
            self.extra, self.unused = _check_names(path, {*self.expected, *scales}, set(self._file_of), self.layout)
            self.left_out = set(self.unused)
            if self.spec.experts.quantization == "fp8":
                self.extra += sorted(scales - self.expected.keys())
            else:
                self.left_out |= scales
            self._check_tensors(self.expected, {*self.fp8, *scales}, converts=dtype is not None)
            if self.fp8:
                _LOG.info("%r: %d FP8 weights are dequantized as they are read", str(path), len(self.fp8))
        except BaseException:
            self.close()
            raise
        unused = sum(self._file_of[name].tensors[name].nbytes for name in self.unused)
        self.nbytes = sum(file.data_bytes for file in self.files.values()) - unused

    def dense(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, source in self.layout.dense.items():
            array = np.empty(source.shape, WEIGHT_DTYPES[source.dtype or self.spec.dtype])
            for piece in source.pieces:
                self._read_piece(piece, array)
            check_finite(array, f"{' + '.join(piece.tensor for piece in source.pieces)!r}", self.path)
            if name == "embed.weight" and _HEAD in self.extra:
                self._check_tied_head(array)
            yield name, array

    def read_block(self, layer: int, expert: int, out: np.ndarray) -> None:
        self._check_block(layer, expert, out)
        form = self.spec.block_format
        form.clear_gaps(out)
        for piece in self.layout.block(layer, expert):
            self._read_piece(piece, form.place(out, piece.parts))
        for part in form.split(out).values():
            check_finite(part, f"layer {layer} expert {expert}", self.path)

    @property
    def dequantizes(self) -> bool:
        """Whether weights that are FP8 on disk, experts among them, become floats for good."""
        return bool(self.fp8) and self.spec.experts.quantization != "fp8"

    def read_extra(self, name: str) -> np.ndarray:
        """One of the `extra` tensors as raw bytes, uint8 `[nbytes]`."""
        file = self._file_of[name]
        out = np.empty(file.tensors[name].nbytes, np.uint8)
        file.read(name, out)
        return out

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _open_files(self) -> None:
        if (self.path / _SINGLE).exists():
            self.files[_SINGLE] = SafetensorsFile(self.path / _SINGLE)
            return
        if not (self.path / INDEX_FILE).exists():
            raise CheckpointError(_no_safetensors(self.path))
        weight_map = _read_index(self.path / INDEX_FILE)
        for name in sorted(set(weight_map.values())):
            if not (self.path / name).exists():
                raise CheckpointError(f"{str(self.path)!r} lacks {name!r}, which its index names: download it again")
            self.files[name] = SafetensorsFile(self.path / name)
        stored = [(tensor, name) for name, file in self.files.items() for tensor in file.tensors]
        if len(dict(stored)) != len(stored) or dict(stored) != weight_map:
            tensor, name = next(iter(dict(stored).items() ^ weight_map.items()), stored[0])
            raise CheckpointError(f"{str(self.path)!r}: its index and its shards disagree about {tensor!r} in {name!r}")

    def _find_layout(self, stored: dict[str, TensorEntry]) -> Layout:
        """Where everything is. Experts that config.json says to be FP8 may be floats all the same."""
        spec, names = self.spec, family_names(self.spec)
        layout = Layout(spec, stored_experts(spec, names, stored))
        if layout.experts == "fp8":
            first = stored.get(layout.block(spec.moe_layers[0], 0)[0].tensor)
            if first is None or first.dtype != FP8_CODE:
                spec = without_fp8(spec)
                layout = Layout(spec, stored_experts(spec, names, stored))
        return layout

    def _check_tensors(self, expected: dict[str, Expected], checked: set[str], converts: bool) -> None:
        """Refuse tensors of other shapes or dtypes than expected; the dtypes of those in `checked` are right."""
        for name, (shape, dtype) in expected.items():
            entry = self._file_of[name].tensors[name]
            if entry.shape != shape:
                raise CheckpointError(
                    f"{str(self.path)!r}: {name!r} has shape {list(entry.shape)}, config.json needs {list(shape)}"
                )
            if name in checked:
                continue
            if dtype == "float8_e4m3fn" and entry.dtype != FP8_CODE:
                raise CheckpointError(
                    f"{str(self.path)!r}: {name!r} is stored as {entry.dtype}, other experts as {FP8_CODE};"
                    f" ask for a dtype to convert"
                )
            if dtype == "uint8" and entry.dtype != "U8":
                raise CheckpointError(f"{str(self.path)!r}: {name!r} is stored as {entry.dtype}, MXFP4 is U8")
            if dtype in (None, "float32") and entry.dtype not in DTYPE_OF_CODE:
                raise CheckpointError(
                    f"{str(self.path)!r}: {name!r} is stored as {entry.dtype}; only float weights"
                    f" ({', '.join(DTYPE_OF_CODE)}) can be read"
                )
            if not converts and not holds_exactly(dtype or self.spec.dtype, entry.dtype, widens=dtype is not None):
                raise CheckpointError(
                    f"{str(self.path)!r}: {name!r} is stored as {entry.dtype}, config.json says {self.spec.dtype};"
                    f" ask for a dtype to convert"
                )

    def _check_tied_head(self, embed: np.ndarray) -> None:
        entry = self._file_of[_HEAD].tensors[_HEAD]
        if entry.shape == embed.shape and entry.dtype in DTYPE_OF_CODE:
            head = np.empty_like(embed)
            self._read_piece(Piece(tensor=_HEAD, shape=embed.shape), head)
            if np.array_equal(as_bits(head), as_bits(embed)):
                return
        raise CheckpointError(
            f"{str(self.path)!r}: config.json ties the embeddings, but {_HEAD!r} differs from the embedding;"
            f" set tie_word_embeddings to false"
        )

    def _read_piece(self, piece: Piece, array: np.ndarray) -> None:
        """Read a piece into its place in `array`, strip by strip where it must be converted or transposed."""
        file = self._file_of[piece.tensor]
        if piece.codes is not None:
            run = self._scratch.take(math.prod(piece.shape)).reshape(piece.shape)
            file.read(piece.tensor, run, piece.start)
            pack(piece.codes, run, piece.view(array))
            return
        if piece.tensor in self.fp8:
            self._read_fp8(piece, array)
            return
        if piece.dtype == "uint8":
            array = as_bits(array)
        dtype = STORED_DTYPES[file.tensors[piece.tensor].dtype]
        place = piece.view(array)
        start = piece.start * dtype.itemsize
        if dtype == array.dtype and piece.axes is None:
            file.read(piece.tensor, place, start)
            return
        row_bytes = math.prod(piece.shape[1:]) * dtype.itemsize
        rows = max(1, _STRIP_BYTES // row_bytes)
        for first in range(0, piece.shape[0], rows):
            strip_place = place[first : first + rows]
            strip = self._scratch.take(strip_place.size * dtype.itemsize).view(dtype).reshape(strip_place.shape)
            file.read(piece.tensor, strip, start + first * row_bytes)
            # An overflow to infinity is reported by the finite check, with the tensor's name.
            with np.errstate(over="ignore"):
                copy_rows(strip.astype(array.dtype, copy=False), strip_place)

    def _read_fp8(self, piece: Piece, array: np.ndarray) -> None:
        """Read a run of rows of an FP8 matrix into its place in `array`, strip by strip."""
        file, weight, place = self._file_of[piece.tensor], self.fp8[piece.tensor], piece.view(array)
        scales = self.read_scales(weight)
        columns = file.tensors[piece.tensor].shape[1]
        rows = max(1, _STRIP_BYTES // (columns * array.itemsize))
        for first in range(0, len(place), rows):
            strip_place = place[first : first + rows]
            floats_bytes = 0 if piece.axes is None else strip_place.nbytes
            scratch = self._scratch.take(floats_bytes + strip_place.size)
            values = scratch[floats_bytes:].reshape(strip_place.shape)
            start = piece.start + first * columns
            file.read(piece.tensor, values, start)
            if has_nan(values):
                raise CheckpointError(f"{piece.tensor!r} of {str(self.path)!r} holds NaN in FP8")
            floats = strip_place
            if piece.axes is not None:
                floats = scratch[:floats_bytes].view(array.dtype).reshape(strip_place.shape)
            with np.errstate(over="ignore"):
                dequantize(values, scales, weight.blocks, start // columns, floats)
            if piece.axes is not None:
                copy_rows(floats, strip_place)

    def read_scales(self, weight: Fp8Weight) -> np.ndarray:
        """The scales of one of `fp8`, float32 `[row blocks, column blocks]`."""
        file = self._file_of[weight.scales]
        entry = file.tensors[weight.scales]
        stored = np.empty(entry.shape, SCALE_DTYPES[entry.dtype])
        file.read(weight.scales, stored)
        scales = stored.astype(np.float32, copy=False)
        check_finite(scales, repr(weight.scales), self.path)
        return scales


def copy_rows(source: np.ndarray, target: np.ndarray) -> None:
    """Copy between arrays of one shape and dtype, either of them a transposed view, a cache line's rows at a time."""
    step = max(1, _LINE_BYTES // source.dtype.itemsize)
    source, target = as_bits(source), as_bits(target)
    for first in range(0, len(source), step):
        target[first : first + step] = source[first : first + step]


def _check_names(path: Path, expected: set[str], present: set[str], layout: Layout) -> tuple[list[str], list[str]]:
    """The names beyond the expected ones of `extra` and of `unused` tensors; raises for any other difference."""
    if missing := sorted(expected - present):
        raise CheckpointError(f"{str(path)!r} lacks {_listed(missing)}")
    spec = layout.spec
    beyond = sorted(present - expected)
    extra = [name for name in beyond if _ROTARY_BUFFER.fullmatch(name) or (name == _HEAD and spec.tie_embeddings)]
    left = sorted(set(beyond) - set(extra))
    unused = [name for name in left if layout.is_unused(name)]
    if unexpected := sorted(set(left) - set(unused)):
        raise CheckpointError(f"{str(path)!r} holds tensors that {spec.family} has no use for: {_listed(unexpected)}")
    if unused:
        _LOG.info("%s of other parts of the model are not read: %s", repr(str(path)), _listed(unused))
    return extra, unused


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} tensor{'s'[: len(names) != 1]}: {', '.join(f'{name!r:.120}' for name in names[:10])}{more}"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{str(path)!r} has no weight_map")
    for tensor, name in weight_map.items():
        if not plain_file_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{str(path)!r} maps {tensor!r:.120} to {name!r:.120}: only .safetensors files beside it are read"
            )
    return weight_map


def _no_safetensors(path: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json"):
        for found in sorted(path.glob(pattern)):
            return (
                f"{str(path)!r} holds no {_SINGLE}, only {found.name!r}: pickled weights are never loaded;"
                f" save the model as safetensors"
            )
    return f"{str(path)!r} holds neither {_SINGLE} nor {INDEX_FILE}"
