"""What the tests hold the modules against: random torch models, their weights in our paths, a plain forward pass."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax import nn
from ef_jax.families import spec_from_config
from ef_jax.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
}

FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 20, "head_dim": 12, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
}


def torch_model(model_type: str, seed: int, **changes: Any) -> Any:
    """A small random float32 model of the family whose logits are of order 1."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sizes = SIZES | FAMILY_SIZES[model_type] | changes
    config = transformers.AutoConfig.for_model(model_type, **sizes, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.0 / np.sqrt(parameter.shape[-1]))
    return model


def spec_of(model: Any) -> ModelSpec:
    """The spec from the model's own `config.json`."""
    return spec_from_config(json.loads(model.config.to_json_string()))


def weights_of(model: Any, spec: ModelSpec) -> tuple[dict[str, jax.Array], list[jax.Array | None]]:
    """Our dense arrays by path, and each layer's expert blocks [E, 3, F, D] (None: dense layer)."""
    state = {name: jnp.asarray(value.float().numpy(), spec.dtype) for name, value in model.state_dict().items()}
    dense = {"embed.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not spec.tie_embeddings:
        dense["head.weight"] = state["lm_head.weight"]
    blocks: list[jax.Array | None] = []
    for index, layer in enumerate(spec.layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        dense[ours + "attn_norm.weight"] = state[theirs + "input_layernorm.weight"]
        dense[ours + "ffn_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if theirs + f"self_attn.q_proj.{kind}" in state:
                parts = [state[theirs + f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
                dense[ours + f"attn.qkv_proj.{kind}"] = jnp.concatenate(parts)
            for name in ("o_proj", "q_norm", "k_norm"):
                if theirs + f"self_attn.{name}.{kind}" in state:
                    dense[ours + f"attn.{name}.{kind}"] = state[theirs + f"self_attn.{name}.{kind}"]
        if layer.ffn == "dense":
            dense[ours + "mlp.block"] = _block(state, theirs + "mlp.")
            blocks.append(None)
            continue
        dense[ours + "router.weight"] = state[theirs + "mlp.gate.weight"]
        if spec.shared is not None:
            dense[ours + "shared.block"] = _block(state, theirs + "mlp.shared_expert.")
            dense[ours + "shared.gate.weight"] = state[theirs + "mlp.shared_expert_gate.weight"]
        gate_up = state[theirs + "mlp.experts.gate_up_proj"]
        down = state[theirs + "mlp.experts.down_proj"].swapaxes(1, 2)
        blocks.append(jnp.stack([*jnp.split(gate_up, 2, axis=1), down], axis=1))
    return dense, blocks


def _block(state: dict[str, jax.Array], prefix: str) -> jax.Array:
    gate, up, down = (state[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return jnp.stack([gate, up, down.T])


def moe(h: jax.Array, ids: jax.Array, weights: jax.Array, blocks: jax.Array, spec: ModelSpec) -> jax.Array:
    """The routed experts by a plain loop over all of them: [B, T, D] -> [B, T, D]."""
    flat = h.reshape(-1, h.shape[-1])
    out = jnp.zeros_like(flat)
    for expert in range(spec.experts.count):
        weight = jnp.where(ids == expert, weights, 0).sum(-1).reshape(-1, 1)
        out += (nn.ffn(flat, blocks[expert], spec.experts.activation) * weight).astype(out.dtype)
    return out.reshape(h.shape)


class Model:
    """The whole model through the modules, one call a chunk of tokens, over caches of a fixed length."""

    def __init__(self, model: Any, spec: ModelSpec, context: int, batch: int = 1):
        self.spec = spec
        dense, self.blocks = weights_of(model, spec)
        self.shapes = {path: (array.shape, array.dtype) for path, array in dense.items()}
        graphdef, paths = nn.top_definition(spec)
        self.top = nn.merge_top(graphdef, [dense[path] for path in paths])
        self.layers = []
        for index, layer in enumerate(spec.layers):
            definition, paths = nn.layer_definition(spec, layer.ffn)
            self.layers.append(nn.merge_layer(definition, [dense[f"layers.{index}.{path}"] for path in paths]))
        cache = nn.cache_shape(spec, batch, context)
        self.caches = [(jnp.zeros(cache.shape, cache.dtype),) * 2 for _ in spec.layers]

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of tokens [B, T] at positions [B, T]; the caches are updated."""
        x = self.top.embed_tokens(jnp.asarray(ids, jnp.int32))
        where = jnp.asarray(positions, jnp.int32)
        for index, layer in enumerate(self.layers):
            window = jnp.int32(self.spec.layers[index].window or nn.FULL_WINDOW)
            x, *cache = layer.attend(x, *self.caches[index], where, window)
            self.caches[index] = tuple(cache)
            blocks = self.blocks[index]
            if blocks is None:
                x = layer.finish(x, layer.ffn_input(x))
            else:
                h, chosen, weights = layer.route(x)
                x = layer.finish(x, h, moe(h, chosen, weights, blocks, self.spec))
        return np.asarray(self.top.logits(x))


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """The torch model's logits [B, T, V] in float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()
