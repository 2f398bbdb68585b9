"""What a model directory's config.json and generation_config.json say together."""

import dataclasses
from pathlib import Path
from typing import Any

from ef_jax.errors import CheckpointError
from ef_jax.families import spec_from_config
from ef_jax.spec import ModelSpec
from ef_jax.weights.directory import read_json_object
from ef_jax.weights.dtypes import DtypeName

_GENERATION = "generation_config.json"


def read_model_config(directory: Path, dtype: DtypeName | None = None) -> tuple[ModelSpec, dict[str, Any]]:
    """The model that a directory describes, and the fields of its generation_config.json, empty if there is none.

    With a `dtype`, it is that of all weights, of experts that are stored in FP8 too.

    Released checkpoints name some of their end-of-text ids only in generation_config.json, where transformers'
    `generate` looks for them: the spec's `eos_ids` are those of both files.

    Raises:
      CheckpointError: a file cannot be read, or generation_config.json names an end-of-text id that is none.
      UnsupportedError: config.json asks for something that is not implemented.
    """
    spec = spec_from_config(read_json_object(directory / "config.json"))
    if dtype is not None:
        spec = dataclasses.replace(without_fp8(spec), dtype=dtype)
    path = directory / _GENERATION
    if not path.exists():
        return spec, {}
    generation = read_json_object(path)
    eos = generation.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in ids:
        # Small models made by transformers repeat their family's id in both files, outside their vocabulary or not.
        if type(token) is not int or not (0 <= token < spec.vocab or token in spec.eos_ids):
            raise CheckpointError(
                f"{str(path)!r}: eos_token_id must be token ids from 0 to {spec.vocab - 1}, got {eos!r:.80}"
            )
    return dataclasses.replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *ids)))), generation


def without_fp8(spec: ModelSpec) -> ModelSpec:
    """The same model with experts in its dtype where they would be FP8."""
    if spec.experts.quantization != "fp8":
        return spec
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, quantization=None))
