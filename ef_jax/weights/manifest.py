"""manifest.json of a converted checkpoint: what was written, from what, and whether all of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from ef_jax.errors import CheckpointError
from ef_jax.families import ExpertLayout
from ef_jax.lossy import quantization
from ef_jax.weights.directory import plain_file_name, read_json_object
from ef_jax.weights.dtypes import WEIGHT_DTYPES, DtypeName, check_dtype_name

NAME = "manifest.json"
FORMAT = "ef_jax-checkpoint"
VERSION = 1
HEADERS_FILE = "safetensors_headers.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a converted checkpoint holds. Checksums are zlib.crc32 of an array's or file's bytes.

    Attributes:
      spec: `ModelSpec.as_dict()`, for tools that read the manifest alone; the library reads source/config.json.
      dtype: of every weight.
      experts: how the source stored its experts.
      nbytes: bytes of the source's tensors, in `dtype`; where experts are quantized, of them as they are stored here.
      fingerprint: identifies the source, and the dtype and the quantization asked for.
      files: name -> checksum of each file in source/.
      dense: our array name -> checksum; empty until the dense checkpoint is committed.
      extra: names and bytes of the arrays in `dense` that are source tensors without weights (rotary buffers).
      layers: decoder layer -> checksum of each expert's block; a layer is here once it is committed.
      complete: everything is written.
      quantization: the blocks were rounded to "int8" or for example "int4:32"; None: they are the source's own.
      calibration_tokens: of the text that they were rounded by; None: to nearest, if at all.
    """

    spec: dict[str, Any]
    dtype: DtypeName
    experts: ExpertLayout
    nbytes: int
    fingerprint: str
    files: dict[str, int]
    dense: dict[str, int] = dataclasses.field(default_factory=dict)
    extra: dict[str, int] = dataclasses.field(default_factory=dict)
    layers: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    complete: bool = False
    quantization: str | None = None
    calibration_tokens: int | None = None

    def to_json(self) -> bytes:
        """The manifest as a JSON text."""
        fields = {"format": FORMAT, "version": VERSION, "checksum": "crc32", **dataclasses.asdict(self)}
        return (json.dumps(fields, indent=1) + "\n").encode()


def is_converted(path: Path) -> bool:
    """Whether a directory is a converted checkpoint, complete or not."""
    return (path / NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a converted checkpoint.

    Raises:
      CheckpointError: it cannot be read, is malformed, or is of another version.
    """
    path = directory / NAME
    fields = read_json_object(path)
    if fields.pop("format", None) != FORMAT:
        raise CheckpointError(f"{str(path)!r} is not a manifest of {FORMAT}")
    version = fields.pop("version", None)
    if version != VERSION or fields.pop("checksum", None) != "crc32":
        raise CheckpointError(f"{str(path)!r} has version {version!r:.40}, this library reads {VERSION}: convert again")
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is malformed: {type(error).__name__} {error}") from None


def _parse(fields: dict[str, Any]) -> Manifest:
    _require(fields["dtype"] in WEIGHT_DTYPES, "dtype")
    _require(fields["experts"] in get_args(ExpertLayout), "experts")
    _require(type(fields["nbytes"]) is int and fields["nbytes"] >= 0, "nbytes")
    _require(isinstance(fields["fingerprint"], str), "fingerprint")
    _require(isinstance(fields["complete"], bool), "complete")
    _require(isinstance(fields["spec"], dict), "spec")
    if (rounded := fields.get("quantization")) is not None:
        _require(isinstance(rounded, str), "quantization")
        quantization(rounded)
    if (tokens := fields.get("calibration_tokens")) is not None:
        _require(type(tokens) is int and tokens > 0, "calibration_tokens")
    _require(all(map(plain_file_name, fields["files"])) and _are_checksums(fields["files"].values()), "files")
    _require(all(map(plain_file_name, fields["dense"])) and _are_checksums(fields["dense"].values()), "dense")
    _require(fields["extra"].keys() <= fields["dense"].keys(), "extra")
    _require(all(type(nbytes) is int and 0 <= nbytes < 2**32 for nbytes in fields["extra"].values()), "extra")
    _require(all(isinstance(sums, list) and _are_checksums(sums) for sums in fields["layers"].values()), "layers")
    layers = {int(layer): sums for layer, sums in fields["layers"].items()}
    return Manifest(**(fields | {"layers": layers, "dtype": check_dtype_name(fields["dtype"])}))


def _are_checksums(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**32 for value in values)


def _require(condition: bool, field: str) -> None:
    if not condition:
        raise ValueError(f"in field {field!r}")
