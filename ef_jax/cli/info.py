"""`ef-jax info`: what a model is, and what it would run on."""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.memory.sizes import format_bytes

if TYPE_CHECKING:
    from ef_jax.spec import ModelSpec

_LIBRARIES = ("jax", "flax", "transformers")


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: the model cannot be used.
    """
    parser = console.Parser(prog="ef-jax info", description="Say what a model is, and what it would run on.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint directory (default: the bundled model)")
    common.add_common_options(parser)
    options = parser.parse_args(words)
    spec, model = _model(common.model_path(options.model))
    contents = {"model": model, "runtime": _runtime(spec)}
    print(console.json_line(contents) if options.json else _table(contents))


def _model(path: Path) -> "tuple[ModelSpec, dict[str, Any]]":
    from ef_jax.memory.parameters import count_parameters
    from ef_jax.weights import open_checkpoint
    from ef_jax.weights.directory import tokenizer_dir

    stored: dict[str, Any]
    if common.is_huggingface(path) and not any(path.glob("*.safetensors")):
        spec = common.read_spec(path, None)
        stored = {"format": "config.json only", "stored_bytes": None, "tokenizer": tokenizer_dir(path) is not None}
    else:
        with open_checkpoint(path) as checkpoint:
            spec = checkpoint.spec
            has_tokenizer = checkpoint.tokenizer_dir is not None
            stored = {"format": checkpoint.format, "stored_bytes": checkpoint.nbytes, "tokenizer": has_tokenizer}
    parameters = count_parameters(spec)
    return spec, {
        "path": str(path),
        **stored,
        "family": spec.family,
        "dtype": spec.dtype,
        "experts_in": spec.block_dtype,
        "context": spec.max_position,
        "vocabulary": spec.vocab,
        "hidden": spec.hidden,
        "layers": len(spec.layers),
        "moe_layers": len(spec.moe_layers),
        "experts_per_layer": spec.experts.count,
        "experts_per_token": spec.experts.top_k,
        "expert_width": spec.experts.width,
        "experts": spec.total_experts,
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "dense_bytes": parameters.dense_bytes,
        "expert_bytes": parameters.expert_bytes,
        "block_bytes": spec.block_bytes,
    }


def _runtime(spec: "ModelSpec") -> dict[str, Any]:
    import jax

    from ef_jax.runtime.expert_kernels import choose_kernels

    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "devices": [
            {"kind": device.device_kind, "platform": device.platform, "memories": _memories(device)}
            for device in jax.local_devices()
        ],
        "kernels": choose_kernels(spec, jax.local_devices()[0]).as_dict(),
    }


def _memories(device: Any) -> list[str]:
    return sorted(memory.kind for memory in device.addressable_memories())


def _table(contents: dict[str, dict[str, Any]]) -> str:
    lines = []
    for part, values in contents.items():
        lines.append(part)
        lines += [f"  {name.replace('_', ' '):18} {_shown(name, value)}" for name, value in values.items()]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none here"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes"):
        return f"{format_bytes(value)} ({value} bytes)"
    if name == "kernels":
        return ", ".join(f"{backend} ({phase})" for phase, backend in value.items())
    if name == "devices":
        return "; ".join(f"{d['platform']} {d['kind']}, memories {', '.join(d['memories'])}" for d in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
