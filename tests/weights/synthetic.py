"""Tiny random checkpoints of every family, written without the code under test."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "intermediate_size": 12, "tie_word_embeddings": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _COMMON | _QWEN | {"model_type": "qwen3_moe", "head_dim": 4, "mlp_only_layers": [0]},
    "qwen2_moe": _COMMON | _QWEN | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 20},
    "olmoe": _COMMON | {"model_type": "olmoe", "num_experts": 4, "intermediate_size": 8},
    "mixtral": _COMMON | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 8},
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def hf_shapes(config: dict[str, Any], fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, as transformers names them."""
    family, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    experts = config.get("num_experts", config.get("num_local_experts"))
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)

    def mlp(base: str, size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up, down = names
        shapes[f"{base}.{gate}.weight"] = shapes[f"{base}.{up}.weight"] = (size, hidden)
        shapes[f"{base}.{down}.weight"] = (hidden, size)

    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        shapes |= {f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"{attention}.{x}_proj.weight": (n, hidden) for x, n in (("q", queries), ("k", keys), ("v", keys))}
        shapes[f"{attention}.o_proj.weight"] = (hidden, queries)
        if family == "qwen2_moe":
            shapes |= {f"{attention}.{x}_proj.bias": (n,) for x, n in (("q", queries), ("k", keys), ("v", keys))}
        if family in ("qwen3_moe", "olmoe"):
            full = family == "olmoe"
            shapes[f"{attention}.q_norm.weight"] = (queries if full else head,)
            shapes[f"{attention}.k_norm.weight"] = (keys if full else head,)
        if index in config.get("mlp_only_layers", []):
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        moe = f"{layer}.block_sparse_moe" if family == "mixtral" and not fused else f"{layer}.mlp"
        shapes[f"{moe}.gate.weight"] = (experts, hidden)
        if family == "qwen2_moe":
            mlp(f"{moe}.shared_expert", config["shared_expert_intermediate_size"])
            shapes[f"{moe}.shared_expert_gate.weight"] = (1, hidden)
        if fused:
            shapes[f"{moe}.experts.gate_up_proj"] = (experts, 2 * width, hidden)
            shapes[f"{moe}.experts.down_proj"] = (experts, hidden, width)
        for expert in range(0 if fused else experts):
            names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            mlp(f"{moe}.experts.{expert}", width, names)
    return shapes


def random_tensors(config: dict[str, Any], fused: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """A model's tensors, drawn at random in the config's dtype."""
    random = np.random.default_rng(seed)
    dtype = DTYPES[config["dtype"]]
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in hf_shapes(config, fused).items()}


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write a Hugging Face checkpoint, with a tokenizer file and a generation config."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {tensor: tensors[tensor] for tensor in sorted(tensors)[number::shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
