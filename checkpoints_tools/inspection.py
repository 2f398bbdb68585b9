"""What is inside a checkpoint, without reading its weights."""

import math
from typing import Any

from ef_jax.weights import Checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's contents as plain JSON types; sizes are in bytes, parameters are counts."""
    spec, layout = checkpoint.spec, checkpoint.layout
    details: dict[str, Any] = {}
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        files = {name: file.data_bytes for name, file in checkpoint.files.items()}
        details = {"files": files, "extra": checkpoint.extra, "fp8_weights": len(checkpoint.fp8)}
    elif isinstance(checkpoint, ConvertedCheckpoint):
        details = {"files": sorted(checkpoint.manifest.files), "extra": sorted(checkpoint.manifest.extra)}
    dense = sum(math.prod(source.shape) for source in layout.dense.values())
    block = math.prod(spec.block_shape) + (2 * spec.experts.width + spec.hidden) * spec.experts.bias
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": spec.family,
        "dtype": spec.dtype,
        "experts_stored": layout.experts,
        "experts_in": spec.block_dtype,
        "bytes": checkpoint.nbytes,
        "layers": len(spec.layers),
        "moe_layers": len(spec.moe_layers),
        "experts": spec.experts.count,
        "top_k": spec.experts.top_k,
        "hidden": spec.hidden,
        "expert_width": spec.experts.width,
        "vocab": spec.vocab,
        "max_position": spec.max_position,
        "tied_embeddings": spec.tie_embeddings,
        "parameters": dense + spec.total_experts * block,
        "active_parameters": dense + len(spec.moe_layers) * spec.experts.top_k * block,
        "dense_bytes": dense * spec.itemsize,
        "block_bytes": spec.block_bytes,
        "expert_bytes": spec.total_experts * spec.block_bytes,
        "tokenizer": checkpoint.tokenizer_dir is not None,
        "generation_config": checkpoint.generation_config,
        **details,
    }


def as_table(contents: dict[str, Any]) -> str:
    """The result of `inspect` as lines of name and value, for people."""
    return "\n".join(f"{name:<18} {_shown(name, value)}" for name, value in contents.items())


def _shown(name: str, value: Any) -> str:
    if name in ("files", "extra") and value:
        names = list(value)
        return f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    if name == "bytes" or name.endswith("_bytes"):
        return f"{value:,} ({value / 1e9:.2f} GB)" if value >= 1e8 else f"{value:,} ({value / 1e6:.2f} MB)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
