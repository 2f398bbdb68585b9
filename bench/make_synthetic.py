"""Writes a random but valid Hugging Face MoE checkpoint of a given size, sharded, streaming and fast.

    python bench/make_synthetic.py DST --family qwen3_moe --bytes 6GB

Weights come from one buffer of normal numbers, read at a different place for every tensor, so that writing is as fast
as the disk and no two experts are the same. There is no tokenizer: give token ids. Prints a table, then one line of
JSON.
"""

import argparse
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

from ef_jax.errors import InputError
from ef_jax.families import spec_from_config
from ef_jax.weights.hf_layout import FAMILY_NAMES, Layout

SHARD_BYTES = 1_000_000_000
_BUFFER_VALUES = 1 << 24
_STD = 0.02
_ITEM_BYTES = 2


def main() -> int:
    """Run the script; the exit code."""
    options = _parser().parse_args()
    try:
        start = time.monotonic()
        result = write_synthetic(options)
        seconds = time.monotonic() - start
    except (InputError, OSError) as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 2
    result |= {"seconds": round(seconds, 2), "gb_per_second": round(result["bytes"] / seconds / 1e9, 2)}
    for name, value in result.items():
        print(f"{name:<14} {value}")
    print(json.dumps(result))
    return 0


def write_synthetic(options: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint that `options` (see `--help`) describe; what was written."""
    config = _config(options, layers=options.layers or 1)
    if options.layers is None:
        bytes_of_one = _total_bytes(config)
        bytes_of_two = _total_bytes(_config(options, layers=2))
        layers = 1 + (options.bytes - bytes_of_one) / (bytes_of_two - bytes_of_one)
        config = _config(options, layers=max(1, round(layers)))
    directory = Path(options.destination)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards = list(_shards(_shapes(config)))
    source = _Weights(options.seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shapes, source)
        weight_map |= dict.fromkeys(shapes, name)
    total = _total_bytes(config)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return {
        "path": str(directory),
        "family": options.family,
        "bytes": total,
        "shards": len(shards),
        "layers": config["num_hidden_layers"],
        "experts": options.experts,
        "tensors": len(weight_map),
    }


class _Weights:
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
    return Layout(spec, "per_expert").tensors()


def _total_bytes(config: dict[str, Any]) -> int:
    return sum(math.prod(shape) for shape in _shapes(config).values()) * _ITEM_BYTES


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


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], source: _Weights) -> None:
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


def _config(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    head_dim = 64
    heads = max(1, options.hidden // head_dim)
    config = {
        "model_type": options.family,
        "dtype": "bfloat16",
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "num_experts_per_tok": options.top_k,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_theta": 10000.0,
    }
    match options.family:
        case "mixtral":
            return config | {"num_local_experts": options.experts, "intermediate_size": options.width}
        case "olmoe":
            return config | {"num_experts": options.experts, "intermediate_size": options.width}
    config |= {
        "num_experts": options.experts,
        "moe_intermediate_size": options.width,
        "intermediate_size": 4 * options.width,
        "norm_topk_prob": True,
    }
    if options.family == "qwen2_moe":
        return config | {"shared_expert_intermediate_size": 4 * options.width}
    return config | {"head_dim": head_dim}


def _bytes(text: str) -> int:
    number = text.upper().removesuffix("B")
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    return int(float(number.rstrip("KMG")) * scale)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", metavar="DST", help="directory to write; must not exist")
    parser.add_argument("--family", choices=tuple(FAMILY_NAMES), default="qwen3_moe")
    parser.add_argument("--bytes", type=_bytes, default="1GB", help="size to come close to, by the number of layers")
    parser.add_argument("--layers", type=int, help="number of layers; overrides --bytes")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
