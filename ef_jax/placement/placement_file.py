"""Placements as files, and the option that names one.

A placement is a compressed npz file of plain arrays: no pickles, so it can be read with `numpy.load(path)` anywhere.

| array | dtype, shape | meaning |
| --- | --- | --- |
| `format` | string | "ef_jax placement" |
| `version` | int64 | 1 |
| `model` | string | name of the model whose routing it was made from; empty if unknown |
| `holds` | bool `[L, E, N]` | the devices that hold each expert |
| `serves` | int16 `[L, E, N]` | the device that computes an expert for the tokens of each device |
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ef_jax.errors import InputError
from ef_jax.new_file import new_file
from ef_jax.placement.placement import Placement
from ef_jax.placement.solve import PLACEMENTS
from ef_jax.spec import ModelSpec

FORMAT = "ef_jax placement"
VERSION = 1

_CONTIGUOUS = "contiguous"
_DTYPES = {"holds": np.dtype(bool), "serves": np.dtype(np.int16)}
_DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


def save_placement(
    placement: Placement, path: str | os.PathLike[str], *, model: str = "", overwrite: bool = False
) -> None:
    """Write a placement to `path`, which appears whole or not at all.

    Raises:
      InputError: the file exists and `overwrite` is not given, or it cannot be written.
    """
    tables = {name: getattr(placement, name) for name in _DTYPES}
    with new_file(path, overwrite=overwrite) as file:
        np.savez_compressed(file, format=FORMAT, version=np.int64(VERSION), model=model, **tables)


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """Read a placement.

    Raises:
      InputError: the file cannot be read, is damaged, or is no placement.
    """
    path = Path(path)
    try:
        return _placement(_read_arrays(path))
    except InputError as error:
        raise InputError(f"{str(path)!r:.200} is not a usable placement: {error}") from None


def load_placement(option: str | os.PathLike[str] | Placement, spec: ModelSpec, owners: int) -> Placement:
    """What the option `placement` gives.

    Args:
      option: "contiguous" for experts in order, a placement, or the file of one.
      spec: the model to place.
      owners: devices of a group, which share the experts.

    Raises:
      InputError: the file cannot be used, or is for other layers, experts or devices.
    """
    layers, experts = len(spec.moe_layers), spec.experts.count
    if option == _CONTIGUOUS:
        return Placement.contiguous(layers=layers, experts=experts, devices=owners)
    if option in PLACEMENTS:
        raise InputError(
            f"placement {option!r} is made from recorded routing: give the file that ef-jax replay --mesh "
            f"expert={owners} --placement {option} --save-placement writes"
        )
    if isinstance(option, Placement):
        placement, named = option, "the placement"
    else:
        placement, named = read_placement(option), f"placement {str(option)!r:.200}"
    fix = "make one for this model with ef-jax replay --mesh --save-placement"
    for found, wanted, what in zip(
        placement.holds.shape, (layers, experts), ("MoE layers", "experts a layer"), strict=False
    ):
        if found != wanted:
            raise InputError(f"{named} is for a model of {found} {what}, this one has {wanted}: {fix}")
    if placement.devices != owners:
        raise InputError(
            f"{named} is for {placement.devices} devices and the mesh shares experts among {owners}: "
            f"give expert={placement.devices}, or make one for {owners} with ef-jax replay --mesh --save-placement"
        )
    return placement


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a placement, as the file has them."""
    names = ("format", "version", *_DTYPES)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise InputError(f"it is not an npz file (nor is it {_CONTIGUOUS!r})")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in names if name in archive}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"it is truncated or damaged: {reason:.200}") from None
    for name in names:
        if name not in arrays:
            raise InputError(f"it has no array {name!r}")
    return arrays


def _placement(arrays: dict[str, np.ndarray]) -> Placement:
    if (found := str(arrays["format"])) != FORMAT:
        raise InputError(f"its format is {found!r:.80}, not {FORMAT!r}")
    if (version := str(arrays["version"])) != str(VERSION):
        raise InputError(f"its version is {version!r:.40}, and only version {VERSION} is known: update ef_jax")
    tables = {}
    for name, dtype in _DTYPES.items():
        tables[name] = table = arrays[name]
        if table.dtype != dtype or table.ndim != 3 or not table.size:
            raise InputError(f"{name} must be {dtype} [L, E, N], got {table.dtype} {list(table.shape)}")
    if tables["holds"].shape != tables["serves"].shape:
        raise InputError("holds and serves are of different shapes")
    devices = tables["holds"].shape[2]
    if tables["serves"].min() < 0 or tables["serves"].max() >= devices:
        raise InputError(f"serves names a device that is not below {devices}")
    return Placement(**tables)
