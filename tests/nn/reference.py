"""What the tests hold the modules against: random torch models, their weights in our paths, a plain forward pass."""

import copy
import json
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax import nn
from ef_jax.families import spec_from_config
from ef_jax.spec import Activation, ModelSpec
from ef_jax.weights import open_checkpoint
from pallas_kernels import ACTIVATIONS
from tests.parity.families import FAMILIES


def torch_model(model_type: str, seed: int, **changes: Any) -> Any:
    """A small random float32 model of the family whose logits are of order 1."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    family = FAMILIES[model_type]
    # Of copies: some configs write into the rope's parameters that they are given.
    sizes = copy.deepcopy({**family.sizes, **changes})
    config = transformers.AutoConfig.for_model(family.config_type or model_type, **sizes, attn_implementation="eager")
    return randomized(transformers.AutoModelForCausalLM.from_config(config).eval())


def randomized(model: Any) -> Any:
    """The model, with random weights that keep its logits at order 1."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.0 / np.sqrt(parameter.shape[-1]))
        stored = model.state_dict()
        for name, buffer in model.named_buffers():  # biases of routers that training sets by counting
            if name in stored:
                buffer.normal_(0.0, 0.2)
    return model


def spec_of(model: Any) -> ModelSpec:
    """The spec from the model's own `config.json`, which names a dtype only once the model is saved."""
    return spec_from_config(json.loads(model.config.to_json_string()) | {"dtype": "float32"})


Blocks = dict[str, jax.Array]


def weights_of(model: Any, spec: ModelSpec) -> tuple[dict[str, jax.Array], list[Blocks | None]]:
    """Our dense arrays by path, and each layer's experts by part of their blocks, [E, ...] (None: dense layer)."""
    form = spec.block_format
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        with open_checkpoint(directory) as checkpoint:
            dense = {name: jnp.asarray(array) for name, array in checkpoint.dense()}
            blocks = np.empty((len(spec.layers), spec.experts.count, *form.shape), form.dtype)
            for layer in spec.moe_layers:
                for expert in range(spec.experts.count):
                    checkpoint.read_block(layer, expert, blocks[layer, expert])
    experts: list[Blocks | None] = [None] * len(spec.layers)
    for layer in spec.moe_layers:
        parts = [form.split(block) for block in blocks[layer]]
        experts[layer] = {name: jnp.asarray(np.stack([part[name] for part in parts])) for name in parts[0]}
    return dense, experts


def expert_ffn(x: jax.Array, block: Blocks, activation: Activation) -> jax.Array:
    """One expert, with biases where it has them."""
    if "down_bias" not in block:
        return nn.ffn(x, block["weights"], activation)
    gate, up, down = block["weights"]
    inner = ACTIVATIONS[activation](x @ gate.T + block["gate_bias"][None], x @ up.T + block["up_bias"][None])
    return inner @ down + block["down_bias"][None]


def moe(h: jax.Array, ids: jax.Array, weights: jax.Array, blocks: Blocks, spec: ModelSpec) -> jax.Array:
    """The routed experts by a plain loop over all of them: [B, T, D] -> [B, T, D]."""
    flat = h.reshape(-1, h.shape[-1])
    out = jnp.zeros_like(flat)
    for expert in range(spec.experts.count):
        weight = jnp.where(ids == expert, weights, 0).sum(-1).reshape(-1, 1)
        before, after = (weight.astype(flat.dtype), 1) if spec.experts.scale_input else (1, weight)
        block = {name: array[expert] for name, array in blocks.items()}
        out += (expert_ffn(flat * before, block, spec.experts.activation) * after).astype(out.dtype)
    return out.reshape(h.shape)


class Model:
    """The whole model through the modules, one call a chunk of tokens, over caches of a fixed length.

    Attributes:
      leaves: each layer's arrays, in the order of `layer_definition`.
      shapes: (shape, dtype) of each dense array, by path.
      streams: of the last call, the residual stream [B, T, D] that each MoE layer's router read.
    """

    def __init__(self, model: Any, spec: ModelSpec, context: int, batch: int = 1):
        self.spec = spec
        dense, self.blocks = weights_of(model, spec)
        self.shapes = {path: (array.shape, array.dtype) for path, array in dense.items()}
        graphdef, paths = nn.top_definition(spec)
        self.top = nn.merge_top(graphdef, [dense[path] for path in paths])
        self.layers: list[nn.DecoderLayer] = []
        self.leaves: list[list[jax.Array]] = []
        self.streams: list[jax.Array] = []
        for index, layer in enumerate(spec.layers):
            definition, paths = nn.layer_definition(spec, layer)
            self.leaves.append([dense[f"layers.{index}.{path}"] for path in paths])
            self.layers.append(nn.merge_layer(definition, self.leaves[-1]))
        self.caches = [
            tuple(jnp.zeros(cache.shape, cache.dtype) for cache in nn.cache_shapes(spec, layer.kind, batch, context))
            for layer in spec.layers
        ]

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of tokens [B, T] at positions [B, T]; the caches are updated."""
        x = self.top.embed_tokens(jnp.asarray(ids, jnp.int32))
        where = jnp.asarray(positions, jnp.int32)
        self.streams = []
        for index, layer in enumerate(self.layers):
            reach = jnp.asarray(nn.reach_of(self.spec.layers[index]))
            x, self.caches[index] = layer.attend(x, self.caches[index], where, reach)
            blocks = self.blocks[index]
            if blocks is None:
                x = layer.finish(x, layer.ffn_input(x))
            else:
                self.streams.append(x)
                h, chosen, weights = layer.route(x)
                x = layer.finish(x, h, moe(h, chosen, weights, blocks, self.spec))
        return np.asarray(self.top.logits(x))

    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the last call: the pre-gate's scores at distance 0 [L, B, T, E], and the layers' choices [L, B, T, K]."""
        layers = [self.layers[index] for index in self.spec.moe_layers]
        stack = nn.stack_routers(self.spec, self.leaves, 1)
        score = jax.jit(lambda x, first: nn.pregate(self.spec, stack, x, first, 1)[..., 0, :])
        choose = [jax.jit(lambda x, layer=layer: layer.route(x)[1]) for layer in layers]
        return (
            np.stack([score(x, jnp.int32(first)) for first, x in enumerate(self.streams)]),
            np.stack([of_layer(x) for of_layer, x in zip(choose, self.streams, strict=True)]),
        )


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """The torch model's logits [B, T, V] in float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()
