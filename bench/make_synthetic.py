"""Writes a random but valid Hugging Face MoE checkpoint of a given size, sharded, streaming and fast.

    python -m bench.make_synthetic DST --family qwen3_moe --bytes 6GB

Weights come from one buffer of normal numbers, read at a different place for every tensor, so that writing is as fast
as the disk and no two experts are the same. There is no tokenizer: give token ids. Prints a table, then one line of
JSON.
"""

import argparse
import dataclasses
import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench import _report
from ef_jax.families import FAMILIES, spec_from_config
from ef_jax.memory.sizes import parse_bytes
from ef_jax.spec import ModelSpec
from ef_jax.weights.layout import Layout

SHARD_BYTES = 1_000_000_000
_BUFFER_VALUES = 1 << 24
_STD = 0.02
_ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Synthetic:
    """A checkpoint to make up: `layers` decoder layers of E `experts`, K `top_k`, D `hidden`, F `width`, V `vocab`."""

    family: str = "qwen3_moe"
    layers: int = 8
    experts: int = 64
    hidden: int = 1024
    width: int = 512
    top_k: int = 8
    vocab: int = 4096
    seed: int = 0

    def of_bytes(self, nbytes: int) -> "Synthetic":
        """The same shape with as many layers as come closest to `nbytes` bytes, at least one."""
        one = dataclasses.replace(self, layers=1).nbytes
        two = dataclasses.replace(self, layers=2).nbytes
        return dataclasses.replace(self, layers=max(1, round(1 + (nbytes - one) / (two - one))))

    @property
    def spec(self) -> ModelSpec:
        """What model it is."""
        return spec_from_config(config_of(self))

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(math.prod(shape) for shape in _shapes(config_of(self)).values()) * _ITEM_BYTES


def main() -> int:
    """Run the script; the exit code."""
    options = _parser().parse_args()
    shape = Synthetic(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Synthetic)})
    if options.bytes is not None:
        shape = shape.of_bytes(options.bytes)
    start = time.monotonic()
    result = write_synthetic(Path(options.destination), shape)
    seconds = time.monotonic() - start
    result |= {"seconds": round(seconds, 2), "gb_per_second": round(result["bytes"] / seconds / 1e9, 2)}
    for name, value in result.items():
        print(f"{name:<14} {value}")
    _report.finish("make_synthetic", result)
    return 0


def write_synthetic(directory: Path, shape: Synthetic) -> dict[str, Any]:
    """Write a checkpoint of `shape` into the new `directory`; what was written.

    Raises:
      FileExistsError: `directory` exists.
      UnsupportedError: the family does not allow the shape.
    """
    config = config_of(shape)
    shards = list(_shards(_shapes(config)))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    source = Weights(shape.seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shapes, source)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {
        "model": directory.name,
        "bytes": shape.nbytes,
        "shards": len(shards),
        "tensors": len(weight_map),
        **dataclasses.asdict(shape),
    }


class Weights:
    """Normal numbers for any tensor, without drawing them anew."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        # The tail repeats the head, so that a run may start anywhere.
        draws = self._random.standard_normal(_BUFFER_VALUES, np.float32) * np.float32(_STD)
        self._buffer = np.concatenate([draws, draws]).astype(ml_dtypes.bfloat16)

    def runs(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The tensor's values, in runs; norms are one, biases are small like any weight."""
        left = math.prod(shape)
        if "norm" in name:
            yield np.ones(left, ml_dtypes.bfloat16)
            return
        while left:
            count = min(left, _BUFFER_VALUES)
            first = int(self._random.integers(_BUFFER_VALUES))
            yield self._buffer[first : first + count]
            left -= count


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    spec = spec_from_config(config)
    return {name: expected.shape for name, expected in Layout(spec, "per_expert").tensors().items()}


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name in sorted(shapes, key=_by_layer):
        nbytes = math.prod(shapes[name]) * _ITEM_BYTES
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shapes[name]
        size += nbytes
    yield shard


def _by_layer(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1, name)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], source: Weights) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for run in source.runs(name, shape):
                file.write(run.view(np.uint8))


def config_of(shape: Synthetic) -> dict[str, Any]:
    """The config.json of a checkpoint of that shape."""
    head_dim = 64
    heads = max(1, shape.hidden // head_dim)
    config = {
        "model_type": shape.family,
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_experts_per_tok": shape.top_k,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_theta": 10000.0,
    }
    match shape.family:
        case "mixtral":
            return config | {"num_local_experts": shape.experts, "intermediate_size": shape.width}
        case "olmoe":
            return config | {"num_experts": shape.experts, "intermediate_size": shape.width}
    config |= {
        "num_experts": shape.experts,
        "moe_intermediate_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "norm_topk_prob": True,
    }
    if shape.family == "qwen2_moe":
        return config | {"shared_expert_intermediate_size": 4 * shape.width}
    return config | {"head_dim": head_dim}


def _parser() -> argparse.ArgumentParser:
    defaults = dataclasses.asdict(Synthetic())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", metavar="DST", help="directory to write; must not exist")
    parser.add_argument("--family", choices=tuple(FAMILIES), default=defaults["family"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--bytes", type=parse_bytes, help="size to come close to, by the number of layers")
    size.add_argument("--layers", type=_report.positive, default=defaults["layers"])
    for name in ("experts", "hidden", "width", "top-k", "vocab"):
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=_report.positive, default=default, help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(_report.run("make_synthetic", main))
