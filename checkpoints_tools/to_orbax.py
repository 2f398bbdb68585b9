"""Hugging Face -> our converted checkpoint: one Orbax checkpoint for the dense arrays and one a MoE layer.

Streaming and resumable: one layer is in memory at a time, and a layer counts as done only when the manifest says so,
which is written after Orbax committed the layer. The source's headers go along, so that the way back is exact.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.destination import (
    WriteError,
    check_new,
    check_space,
    locked,
    remove,
    reporting_write_errors,
    staged,
    write_atomically,
)
from ef_jax.errors import CheckpointError, InputError, UnsupportedError
from ef_jax.progress import Progress
from ef_jax.weights import Checkpoint
from ef_jax.weights.converted import DENSE, SOURCE, block_name, layer_dir
from ef_jax.weights.directory import CARRIED_FILES, INDEX_FILE, read_text_file
from ef_jax.weights.dtypes import (
    BITS_OF_CODE,
    CODE_OF_NAME,
    WEIGHT_DTYPES,
    as_bytes,
    check_dtype_name,
    holds_exactly,
)
from ef_jax.weights.fp8 import comes_back
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from ef_jax.weights.manifest import HEADERS_FILE, NAME, Manifest, is_converted, read_manifest
from ef_jax.weights.quantized import QuantizedCheckpoint
from ef_jax.weights.safetensors import SafetensorsFile, parse_json

_HEAD = "lm_head.weight"
# zarr.json, the array's four directories and the last block's slack, in blocks of 4 KiB.
_OVERHEAD_BYTES_PER_ARRAY = 24 << 10
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096
_READERS = 4


def convert_to_orbax(
    source: HuggingFaceCheckpoint,
    destination: Path,
    dtype: str | None = None,
    show_progress: bool | None = None,
    *,
    quantize: str | None = None,
    calibrate: Sequence[int] | None = None,
) -> Manifest:
    """Write the converted checkpoint of `source` to the directory `destination`, or finish writing it.

    Args:
      source: an open Hugging Face checkpoint, opened with the same `dtype`.
      destination: must not exist, unless it is the unfinished conversion of the same source to the same dtype and
        quantization.
      dtype: the dtype that was asked for; None keeps the source's.
      show_progress: draw a progress bar; None does so on a terminal.
      quantize: round the experts to "int8", "int4" or for example "int4:64"; there is no way back.
      calibrate: token ids of a text to round them by; None rounds to nearest.

    Returns:
      The complete manifest.

    Raises:
      CheckpointError: the source cannot be read or holds NaN; the destination is removed.
      UnsupportedError: its FP8 weights could not be had back.
      InputError: the experts cannot be so quantized; the destination cannot be used or written. What was finished of
        it stays, for resuming.
    """
    blocks: Checkpoint = source
    if quantize is not None:
        blocks = QuantizedCheckpoint(source, quantize)
    used = None
    if calibrate is not None:
        from checkpoints_tools.calibration import CalibratedCheckpoint, calibration_tokens

        used = calibration_tokens(source.spec, calibrate)
    _check_way_back(source)
    read = {name: file for name, file in source.files.items() if file.tensors.keys() - source.left_out}
    headers = {name: _header_in_dtype(source, file) for name, file in read.items()}
    files = _source_files(source, headers, converts=dtype is not None or source.dequantizes)
    quantization = None if quantize is None else blocks.spec.block_dtype
    arrays = len(source.layout.dense) + len(source.extra) + source.spec.total_experts
    weights_bytes = sum(_tensor_bytes(header) for header in headers.values())
    weights_bytes -= source.spec.total_experts * (source.spec.block_bytes - blocks.spec.block_bytes)
    manifest = Manifest(
        spec=blocks.spec.as_dict(),
        dtype=check_dtype_name(source.spec.dtype),
        experts=source.layout.experts,
        nbytes=weights_bytes,
        fingerprint=_fingerprint(source, files, f"{quantization or ''}{'' if calibrate is None else list(calibrate)}"),
        files={name: zlib.crc32(data) for name, data in files.items()},
        quantization=quantization,
        calibration_tokens=used,
    )
    needed = weights_bytes + _bytes_of_dequantizing(source) + arrays * _OVERHEAD_BYTES_PER_ARRAY
    if is_converted(destination):
        done = _unfinished(destination, manifest)
        left = 1 - len(done.layers) / len(source.spec.moe_layers)
        check_space(destination, int(left * needed))
        manifest = done
    else:
        check_new(destination, needed + sum(map(len, files.values())))
        with staged(destination) as stage:
            (stage / SOURCE).mkdir()
            for name, data in files.items():
                (stage / SOURCE / name).write_bytes(data)
            write_atomically(stage / NAME, manifest.to_json())
    with locked(destination):
        try:
            if quantize is not None and calibrate is not None:
                blocks = CalibratedCheckpoint(source, quantize, calibrate)
            with reporting_write_errors(destination):
                return _write_arrays(source, blocks, destination, manifest, show_progress)
        except WriteError as error:
            if not read_manifest(destination).layers:
                remove(destination)
                raise
            raise WriteError(f"{error}; what is finished stays: make room and run the same command again") from error
        except CheckpointError:
            remove(destination)
            raise


def _write_arrays(
    source: HuggingFaceCheckpoint,
    expert_source: Checkpoint,
    destination: Path,
    manifest: Manifest,
    show_progress: bool | None,
) -> Manifest:
    spec = expert_source.spec
    _remove_uncommitted(destination, manifest)
    with Progress(len(spec.moe_layers), "layers", "converting", enabled=show_progress) as progress:
        if not manifest.dense:
            manifest = _write_dense(source, destination, manifest)
        blocks = np.empty((spec.experts.count, *spec.block_format.shape), spec.block_format.dtype)
        for layer in spec.moe_layers:
            if layer not in manifest.layers:
                checksums = _read_layer(expert_source, layer, blocks)
                tree = {block_name(expert): block for expert, block in enumerate(blocks)}
                _save(layer_dir(destination, layer), tree)
                manifest = dataclasses.replace(manifest, layers={**manifest.layers, layer: checksums})
                write_atomically(destination / NAME, manifest.to_json())
            progress.update()
    manifest = dataclasses.replace(manifest, complete=True)
    write_atomically(destination / NAME, manifest.to_json())
    return manifest


def _write_dense(source: HuggingFaceCheckpoint, destination: Path, manifest: Manifest) -> Manifest:
    tree = dict(source.dense())
    # A tied head is the embedding again; only its name is kept, in the header.
    extra = [name for name in source.extra if name != _HEAD]
    tree |= {name: source.read_extra(name) for name in extra}
    _save(destination / DENSE, tree)
    manifest = dataclasses.replace(
        manifest,
        dense={name: zlib.crc32(as_bytes(array)) for name, array in tree.items()},
        extra={name: tree[name].nbytes for name in extra},
    )
    write_atomically(destination / NAME, manifest.to_json())
    return manifest


def _read_layer(source: Checkpoint, layer: int, blocks: np.ndarray) -> list[int]:
    """Fill `blocks` `[E, ...]` with a layer's blocks; their checksums."""

    def read(expert: int) -> int:
        source.read_block(layer, expert, blocks[expert])
        return zlib.crc32(as_bytes(blocks[expert]))

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(read, range(len(blocks))))


def _save(path: Path, tree: dict[str, np.ndarray]) -> None:
    """Write one Orbax checkpoint whose arrays are each a raw file: no OCDBT, no compression."""
    # Orbax takes seconds to import; a bad destination or source should not have to wait for it.
    from orbax.checkpoint.experimental import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    # The arrays are not touched until the save is over, so that Orbax need not copy them.
    context.memory.deepcopy_host_arrays = False
    with context, _quiet_orbax():
        ocp.save(path.absolute(), tree)


_REPEATED = (
    "Skipping merge of OCDBT checkpoints",
    "_SignalingThread.run() raised an exception",
    "exception was never retrieved",
)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drop what Orbax prints beside the exceptions that it raises.

    It warns that there is nothing to merge, which is so whenever OCDBT is off. When writing fails, its threads log the
    error that it raises anyway, and TensorStore's threads, finding its event loop closed, print tracebacks. A second
    array that fails before the loop is closed leaves a task or a future whose error nobody asks for, which asyncio
    logs. Some of that comes after the exception, so that it goes on being dropped then.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _REPEATED)

    def print_traceback(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    previous_hook = sys.unraisablehook
    sys.unraisablehook = print_traceback
    yield
    sys.unraisablehook = previous_hook
    for logger in loggers:
        logger.removeFilter(keep)


def _unfinished(destination: Path, wanted: Manifest) -> Manifest:
    """The manifest of an unfinished conversion that may go on as `wanted`."""
    found = read_manifest(destination)
    if found.complete:
        raise InputError(f"destination {str(destination)!r} exists: remove it or choose another")
    if found.fingerprint != wanted.fingerprint:
        raise InputError(
            f"destination {str(destination)!r} is the unfinished conversion of another source or to another dtype"
            f" or quantization: remove it or choose another"
        )
    return found


def _remove_uncommitted(destination: Path, manifest: Manifest) -> None:
    committed = {layer_dir(destination, layer) for layer in manifest.layers}
    candidates = [*(destination / "layers").glob("*"), *destination.glob(f"{DENSE}*")]
    for path in candidates:
        if path not in committed and not (path.name == DENSE and manifest.dense):
            shutil.rmtree(path)


def _fingerprint(source: HuggingFaceCheckpoint, files: dict[str, bytes], quantization: str) -> str:
    """A digest of the source's text files, headers and a sample of its weights, and of the quantization."""
    digest = hashlib.blake2b(quantization.encode(), digest_size=16)
    for name, data in files.items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    for name, file in source.files.items():
        digest.update(f"{name} {len(file.header)} ".encode() + file.header)
        tensors = list(file.tensors)
        for tensor in tensors[:: max(1, len(tensors) // _SAMPLES_PER_FILE)]:
            sample = np.empty(min(_SAMPLE_BYTES, file.tensors[tensor].nbytes), np.uint8)
            file.read(tensor, sample)
            digest.update(sample)
    return digest.hexdigest()


def _check_way_back(source: HuggingFaceCheckpoint) -> None:
    """Beside FP8 experts, other FP8 weights are written as floats and their scales beside them: refuse those that
    cannot be divided by their scales again."""
    for name, weight in {} if source.dequantizes else source.fp8.items():
        dtype = source.expected[name].dtype or source.spec.dtype
        if not comes_back(source.read_scales(weight), dtype):
            raise UnsupportedError(
                f"{str(source.path)!r}: {weight.scales!r} holds scales that take FP8 out of the range of {dtype}, from"
                f" which there would be no way back: convert with a --dtype"
            )


def _bytes_of_dequantizing(source: HuggingFaceCheckpoint) -> int:
    """What FP8 weights that are written as floats need beyond their bytes in the headers."""
    weights = [] if source.dequantizes else [source.expected[name] for name in source.fp8]
    itemsizes = [WEIGHT_DTYPES[weight.dtype or source.spec.dtype].itemsize for weight in weights]
    return sum(math.prod(weight.shape) * (size - 1) for weight, size in zip(weights, itemsizes, strict=True))


def _source_files(source: HuggingFaceCheckpoint, headers: dict[str, bytes], converts: bool) -> dict[str, bytes]:
    """What goes into source/: the text files, speaking of the new dtype if there is one, and every header."""
    names = [name for name in (*CARRIED_FILES, INDEX_FILE) if (source.path / name).is_file()]
    files = {name: read_text_file(source.path / name) for name in names}
    if converts:
        config = parse_json(files["config.json"])
        if source.fp8:
            del config["quantization_config"]
        config |= {key: source.spec.dtype for key in ("dtype", "torch_dtype") if key in config} or {
            "torch_dtype": source.spec.dtype
        }
        files["config.json"] = _json(config)
    if INDEX_FILE in files and (converts or source.left_out):
        index = parse_json(files[INDEX_FILE])
        index["metadata"] = {"total_size": sum(_tensor_bytes(header) for header in headers.values())}
        index["weight_map"] = {k: name for k, name in index["weight_map"].items() if k not in source.left_out}
        files[INDEX_FILE] = _json(index)
    texts = {name: header.decode() for name, header in headers.items()}
    return files | {HEADERS_FILE: json.dumps(texts).encode()}


def _header_in_dtype(source: HuggingFaceCheckpoint, file: SafetensorsFile) -> bytes:
    """The file's header without unused tensors and with the weights in the dtypes that they are held in, or narrower
    ones that they are the same in; as it is if nothing changes."""
    codes = {
        name: _code(source, name, entry.dtype) for name, entry in file.tensors.items() if name not in source.left_out
    }
    if codes == {name: entry.dtype for name, entry in file.tensors.items()}:
        return file.header
    whole: dict[str, Any] = parse_json(file.header)
    header = {"__metadata__": whole["__metadata__"]} if "__metadata__" in whole else {}
    end = 0
    for name, code in codes.items():
        shape = file.tensors[name].shape
        start, end = end, end + math.prod(shape) * BITS_OF_CODE[code] // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _code(source: HuggingFaceCheckpoint, name: str, stored: str) -> str:
    """The dtype that a tensor has in the converted checkpoint's headers, and so on the way back."""
    if (name in source.extra and name != _HEAD) or (name in source.fp8 and not source.dequantizes):
        return stored
    held = source.expected[name].dtype if name in source.expected else None
    if held is None:
        return CODE_OF_NAME[source.spec.dtype]
    return stored if holds_exactly(held, stored, widens=True) else CODE_OF_NAME[held]


def _tensor_bytes(header: bytes) -> int:
    fields = parse_json(header)
    return max((value["data_offsets"][1] for name, value in fields.items() if name != "__metadata__"), default=0)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
