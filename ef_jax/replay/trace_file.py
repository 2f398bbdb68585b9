"""Routing traces as files.

A trace is a compressed npz file of plain arrays: no pickles, so it can be read with `numpy.load(path)` anywhere.

| array | dtype, shape | meaning |
| --- | --- | --- |
| `format` | string | "ef_jax routing trace" |
| `version` | int64 | 1 |
| `model` | string | name of the model; empty if unknown |
| `fingerprint` | string, optional | digest of the model's sizes and routers |
| `num_experts` | int64 | E, experts a layer |
| `experts` | uint8 or uint16 `[N, L, K]` | expert ids by token, MoE layer and rank, distinct within a row |
| `tokens` | int32 `[N]` | token that each row processed |
| `offsets` | int64 `[Q+1]` | sequence q is rows `offsets[q]` to `offsets[q+1]` |
| `phases` | uint8 `[N]` | 0 prompt, 1 decode |
| `passes` | int64 `[N]`, optional | number of the forward pass: rows of one number ran together, in this order |
| `block_bytes` | int64, optional | bytes of one expert's block |
| `lossy` | string, optional | what changed the results of the run that was recorded |
| `weights` | float16 `[N, L, K]`, optional | the router's weights |
| `pregate` | float16 `[N, L, H, E]`, optional | at `[n, s, d - 1]`, the choice scores of layer s - 1 + d for source s |

A file with nothing but `experts`, `tokens`, `offsets` and `num_experts`, of any integer types, is read too: then every
token counts as decoded. Arrays of other names are left alone. Compressing saves a third of a trace of ids and costs
half a second for 13 million of them.
"""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import InputError
from ef_jax.new_file import new_file
from ef_jax.replay.trace import DECODE, RoutingTrace
from ef_jax.replay.trace_checks import MAX_EXPERTS

FORMAT = "ef_jax routing trace"
VERSION = 1

_REQUIRED = ("experts", "tokens", "offsets", "num_experts")
_TEXTS = ("fingerprint", "lossy")
_OPTIONAL = ("format", "version", "model", "phases", "passes", "block_bytes", "weights", "pregate", *_TEXTS)
_NAMES = _REQUIRED + _OPTIONAL
_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)
_MAX_INT64 = 2**63 - 1


def save_trace(trace: RoutingTrace, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a trace to `path`, which appears whole or not at all.

    Raises:
      InputError: the file exists and `overwrite` is not given, or it cannot be written.
    """
    arrays: dict[str, Any] = {"format": FORMAT, "version": np.int64(VERSION), "model": trace.model}
    arrays |= {name: getattr(trace, name) for name in ("experts", "tokens", "offsets", "phases")}
    arrays["num_experts"] = np.int64(trace.num_experts)
    arrays |= {name: text for name in _TEXTS if (text := getattr(trace, name))}
    if trace.block_bytes is not None:
        arrays["block_bytes"] = np.int64(trace.block_bytes)
    for name in ("passes", "weights", "pregate"):
        if (array := getattr(trace, name)) is not None:
            arrays[name] = array
    with new_file(path, overwrite=overwrite) as file:
        np.savez_compressed(file, **arrays)


def load_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Read a trace, or a plain npz of routed experts.

    Raises:
      InputError: the file cannot be read, is damaged, or is no trace.
    """
    path = Path(path)
    try:
        return _trace(_read_arrays(path))
    except InputError as error:
        raise InputError(f"{str(path)!r:.200} is not a usable routing trace: {error}") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a trace that the file has, as it has them."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise InputError("it is not an npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in _NAMES if name in archive}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"it is truncated or damaged: {reason:.200}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{name!r} is not an array")
    for name in _REQUIRED:
        if name not in arrays:
            raise InputError(f"it has no array {name!r}")
    return arrays


def _trace(arrays: dict[str, np.ndarray]) -> RoutingTrace:
    if "format" in arrays:
        if (found := str(arrays["format"])) != FORMAT:
            raise InputError(f"its format is {found!r:.80}, not {FORMAT!r}")
        version = _number(arrays, "version") if "version" in arrays else None
        if version != VERSION:
            raise InputError(f"its version is {version}, and only version {VERSION} is known: update ef_jax")
    num_experts = _number(arrays, "num_experts")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InputError(f"num_experts is {num_experts}: a trace has 1 to {MAX_EXPERTS} experts a layer")
    experts = _integers(arrays, "experts", 0, num_experts - 1)
    phases = _integers(arrays, "phases", 0, 1) if "phases" in arrays else np.full(len(experts), DECODE)
    passes = _integers(arrays, "passes", 0, _MAX_INT64) if "passes" in arrays else None
    return RoutingTrace(
        experts=experts.astype(np.uint8 if num_experts <= 1 << 8 else np.uint16, copy=False),
        tokens=_integers(arrays, "tokens", -(2**31), 2**31 - 1).astype(np.int32, copy=False),
        offsets=_integers(arrays, "offsets", 0, _MAX_INT64).astype(np.int64, copy=False),
        num_experts=num_experts,
        phases=phases.astype(np.uint8, copy=False),
        passes=None if passes is None else passes.astype(np.int64, copy=False),
        model=str(arrays["model"]) if "model" in arrays else "",
        **{name: str(arrays[name]) for name in _TEXTS if name in arrays},
        block_bytes=_number(arrays, "block_bytes") if "block_bytes" in arrays else None,
        weights=arrays.get("weights"),
        pregate=arrays.get("pregate"),
    )


def _integers(arrays: dict[str, np.ndarray], name: str, low: int, high: int) -> np.ndarray:
    """An array of whole numbers from `low` to `high`."""
    array = arrays[name]
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must hold whole numbers, got {array.dtype}")
    if array.size:
        for value in (int(array.min()), int(array.max())):
            if not low <= value <= high:
                raise InputError(f"{name} holds {value}, and only {low} to {high} is possible")
    return array


def _number(arrays: dict[str, np.ndarray], name: str) -> int:
    array = arrays[name]
    if array.dtype.kind not in "iu" or array.size != 1:
        raise InputError(f"{name} must be one whole number, got {array.dtype} of shape {array.shape}")
    return int(array.item())
