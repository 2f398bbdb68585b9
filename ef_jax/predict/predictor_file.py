"""A trained predictor on disk: a directory with an Orbax checkpoint and a manifest.json; nothing is pickled.

| field of the manifest | meaning |
| --- | --- |
| `format`, `version` | "ef_jax-predictor", 1 |
| `kind` | "correction" or "routing_path" |
| `spec` | `CorrectionSpec` or `RoutingPathSpec`, by field |
| `fingerprint` | `model_fingerprint` of the model that it was trained for |
| `model` | that model's name, for people |
| `checksums` | zlib.crc32 of each array's bytes, by name |
| `training` | a summary for people |
"""

import dataclasses
import json
import os
import secrets
import shutil
import zlib
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

from ef_jax.errors import InputError
from ef_jax.nn.correction import Correction, CorrectionSpec
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.spec import ModelSpec
from ef_jax.weights.directory import read_json_object

MANIFEST = "manifest.json"
WEIGHTS = "weights"
FORMAT = "ef_jax-predictor"
VERSION = 1

Spec = TypeVar("Spec", CorrectionSpec, RoutingPathSpec)
_KINDS: dict[str, tuple[type, str]] = {
    "correction": (CorrectionSpec, "a correction of pre-gate scores"),
    "routing_path": (RoutingPathSpec, "a routing path"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorManifest(Generic[Spec]):
    """What a predictor's directory holds; see the module."""

    spec: Spec
    fingerprint: str
    model: str
    checksums: dict[str, int]
    training: dict[str, Any]


def check_new_predictor(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a place for a predictor that is taken or cannot be written.

    Raises:
      InputError: it exists and may not be overwritten, or is no predictor, or its directory cannot be written.
    """
    path = Path(path)
    try:
        if not path.name:
            raise InputError(f"{str(path)!r} is no name for a predictor: give a new directory")
        if os.path.lexists(path):
            if not overwrite:
                raise InputError(f"{str(path)!r} exists: choose another name, or overwrite it with --overwrite")
            if not (path / MANIFEST).is_file() or read_json_object(path / MANIFEST).get("format") != FORMAT:
                raise InputError(f"{str(path)!r} exists and is no predictor: choose another name")
        if not path.parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {str(path)!r}: {str(path.parent)!r} is not writable")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror}") from None


def save_predictor(
    path: str | os.PathLike[str],
    predictor: Correction | RoutingPath,
    *,
    fingerprint: str,
    model: str,
    training: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a predictor to the directory `path`, which appears whole or not at all.

    Args:
      path: a directory that does not exist, or a predictor that may be overwritten.
      predictor: what to write.
      fingerprint: `model_fingerprint` of its model.
      model: the model's name.
      training: JSON for people.
      overwrite: replace a predictor that is there.

    Raises:
      InputError: it cannot be written.
    """
    path = Path(path)
    check_new_predictor(path, overwrite=overwrite)
    arrays = _arrays(predictor)
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "kind": _kind(type(predictor.spec)),
        "spec": dataclasses.asdict(predictor.spec),
        "fingerprint": fingerprint,
        "model": model,
        "checksums": {name: _checksum(array) for name, array in arrays.items()},
        "training": training,
    }
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        stage.mkdir()
        _save(stage / WEIGHTS, arrays)
        (stage / MANIFEST).write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n")
        if path.exists():
            shutil.rmtree(path)
        stage.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r:.200}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load_predictor(
    path: str | os.PathLike[str], spec: ModelSpec, fingerprint: str
) -> tuple[Correction, PredictorManifest[CorrectionSpec]]:
    """The correction in the directory `path`, and what its manifest says.

    Args:
      path: the directory.
      spec: the model that it is for.
      fingerprint: that model's `model_fingerprint`.

    Raises:
      InputError: there is no correction, it is damaged, or it was trained for another model.
    """
    manifest = read_predictor_manifest(path, CorrectionSpec)
    _check_model(Path(path), manifest, spec, fingerprint)
    correction = nnx.eval_shape(lambda: Correction(manifest.spec, rngs=nnx.Rngs(0)))
    _fill(correction, Path(path), manifest.checksums)
    return correction, manifest


def load_routing_path(
    path: str | os.PathLike[str], spec: ModelSpec, fingerprint: str
) -> tuple[RoutingPath, PredictorManifest[RoutingPathSpec]]:
    """The routing path in the directory `path`, and what its manifest says; as `load_predictor`."""
    manifest = read_predictor_manifest(path, RoutingPathSpec)
    _check_model(Path(path), manifest, spec, fingerprint)
    routing_path = nnx.eval_shape(lambda: RoutingPath(manifest.spec, rngs=nnx.Rngs(0)))
    _fill(routing_path, Path(path), manifest.checksums)
    return routing_path, manifest


def read_predictor_kind(path: str | os.PathLike[str]) -> str:
    """What a predictor is: "correction" or "routing_path".

    Raises:
      InputError: there is none, or it is of another version or of no known kind.
    """
    return str(_manifest_fields(Path(path))["kind"])


def read_predictor_manifest(path: str | os.PathLike[str], kind: type[Spec]) -> PredictorManifest[Spec]:
    """What a predictor is, without its weights.

    Args:
      path: the directory.
      kind: `CorrectionSpec` or `RoutingPathSpec`, what the predictor must be built for.

    Raises:
      InputError: there is none, it is of the other kind, or its manifest is damaged or of another version.
    """
    path = Path(path)
    fields = _manifest_fields(path)
    if fields["kind"] != _kind(kind):
        found, wanted = _KINDS[fields["kind"]][1], _KINDS[_kind(kind)][1]
        raise InputError(f"predictor {str(path)!r:.200} is {found}, and here {wanted} is asked for")
    try:
        sizes = dict(fields["spec"])
        if "decays" in sizes:
            sizes["decays"] = tuple(float(decay) for decay in sizes["decays"])
        for name in sizes.keys() - {"decays"}:
            if type(sizes[name]) is not int:
                raise TypeError(f"{name} is no whole number")
        return PredictorManifest(
            spec=kind(**sizes),
            fingerprint=str(fields["fingerprint"]),
            model=str(fields["model"]),
            checksums={str(name): int(value) for name, value in fields["checksums"].items()},
            training=dict(fields["training"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"predictor {str(path)!r:.200}: {MANIFEST} is damaged: {error!s:.120}") from None


def _manifest_fields(path: Path) -> dict[str, Any]:
    """The manifest's JSON, once format, version and kind are known ones."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{str(path)!r:.200} is no predictor: it has no {MANIFEST}")
    fields = read_json_object(path / MANIFEST)
    if fields.get("format") != FORMAT:
        raise InputError(f"{str(path)!r:.200} is no predictor: its {MANIFEST} is of something else")
    if fields.get("version") != VERSION:
        raise InputError(
            f"predictor {str(path)!r:.200} has version {fields.get('version')!r:.40}, and only {VERSION} is known: "
            "train it again"
        )
    if fields.get("kind") not in _KINDS:
        raise InputError(
            f"predictor {str(path)!r:.200} is of kind {fields.get('kind')!r:.40}, and known are {', '.join(_KINDS)}: "
            "update ef_jax"
        )
    return fields


def _kind(spec: type) -> str:
    return next(kind for kind, (own, _) in _KINDS.items() if own is spec)


def _check_model(path: Path, manifest: PredictorManifest[Any], spec: ModelSpec, fingerprint: str) -> None:
    own = manifest.spec
    for name, trained, given in (
        ("MoE layers", own.layers, len(spec.moe_layers)),
        ("experts a layer", own.experts, spec.experts.count),
        ("experts a token", own.top_k, spec.experts.top_k),
        ("tokens in its vocabulary", own.vocab, spec.vocab),
    ):
        if trained != given:
            raise InputError(
                f"predictor {str(path)!r:.200} is for a model of {trained} {name} ({manifest.model!r:.80}), "
                f"this one has {given}: train one for this model with ef-jax train-predictor"
            )
    if manifest.fingerprint != fingerprint:
        raise InputError(
            f"predictor {str(path)!r:.200} was trained for a model with other routers ({manifest.model!r:.80}): "
            "train one for this model with ef-jax train-predictor"
        )


def _fill(predictor: nnx.Module, path: Path, checksums: dict[str, int]) -> None:
    """Give a predictor without arrays those of its directory."""
    params = _params(predictor)
    for name, array in _load(path, _arrays(predictor), checksums).items():
        params[name].set_value(jax.numpy.asarray(array))


def _params(predictor: nnx.Module) -> dict[str, Any]:
    """Parameters by name, such as `decoder.0.attend.enter`."""
    return {".".join(map(str, place)): node for place, node in nnx.iter_graph(predictor) if isinstance(node, nnx.Param)}


def _arrays(predictor: nnx.Module) -> dict[str, Any]:
    """Arrays, or their shapes, by name."""
    return {name: param.get_value() for name, param in _params(predictor).items()}


def _checksum(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8))


def _save(path: Path, arrays: dict[str, Any]) -> None:
    # Orbax takes seconds to import; a bad path should not have to wait for it.
    from orbax.checkpoint.experimental import v1 as ocp

    ocp.save(path.absolute(), {name: np.asarray(array) for name, array in arrays.items()})


def _load(path: Path, shapes: dict[str, Any], checksums: dict[str, int]) -> dict[str, np.ndarray]:
    from orbax.checkpoint.experimental import v1 as ocp

    wanted = {name: np.empty(shape.shape, shape.dtype) for name, shape in shapes.items()}
    try:
        arrays = ocp.load((path / WEIGHTS).absolute(), wanted)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"predictor {str(path)!r:.200}: its weights cannot be read: {reason:.200}") from None
    for name, array in wanted.items():
        found = np.asarray(arrays[name])
        if found.shape != array.shape or found.dtype != array.dtype or _checksum(found) != checksums.get(name):
            raise InputError(f"predictor {str(path)!r:.200}: its weights {name!r} are damaged: train it again")
    return {name: np.asarray(arrays[name]) for name in wanted}
