"""Gated DeltaNet against transformers' modules, with whatever projections they have."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")

from ef_jax.nn.delta_net import GatedDeltaNet, delta_net_cache
from ef_jax.spec import ModelSpec
from ef_jax.weights.layout.delta_net import delta_net_sources
from tests.nn import reference
from tests.parity.families import _delta_net

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS = 90  # more than one chunk of the rule, in theirs and in ours


@pytest.mark.parametrize("changes", [{}, _delta_net.EQUAL_HEADS], ids=["grouped heads", "equal heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_against_transformers(model_type: str, dtype: str, changes: dict[str, Any]) -> None:
    import torch

    module = reference.torch_model(model_type, 5, **changes)
    spec = dataclasses.replace(reference.spec_of(module), dtype=dtype)
    theirs = module.model.layers[0].linear_attn.to(getattr(torch, dtype))
    ours = our_module(spec, {f"theirs.{name}": tensor.float().numpy() for name, tensor in theirs.state_dict().items()})
    x = np.array(jax.random.normal(jax.random.key(0), (2, TOKENS, spec.hidden)))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).to(getattr(torch, dtype))).float().numpy()
    cache = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in delta_net_cache(spec, spec.delta_net, 2))
    run = jax.jit(lambda x, cache, positions: ours(x, cache, positions, jnp.zeros(2, jnp.int32)))
    out, start = [], 0
    for width in (TOKENS - 3, 1, 1, 1):
        positions = jnp.broadcast_to(jnp.arange(start, start + width, dtype=jnp.int32), (2, width))
        part, cache = run(jnp.asarray(x[:, start : start + width], dtype), cache, positions)
        out.append(np.asarray(part, np.float32))
        start += width
    scale = expected.std()
    assert scale > 0.1
    difference = np.abs(np.concatenate(out, axis=1) - expected) / scale
    # A norm of what nearly cancels scales up what rounding left of it, in both: few of bfloat16's outputs are far off.
    assert np.quantile(difference, 0.99) < (2e-5 if dtype == "float32" else 0.05)
    assert difference.max() < (1e-3 if dtype == "float32" else 0.5)


def our_module(spec: ModelSpec, tensors: dict[str, np.ndarray]) -> GatedDeltaNet:
    """The module over transformers' tensors, by the map that checkpoints are read by."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: GatedDeltaNet(spec, spec.delta_net, rngs=nnx.Rngs(0))))
    sources = dict(delta_net_sources(spec, spec.delta_net, "ours", "theirs"))
    arrays = []
    for path, leaf in nnx.to_flat_state(state):
        source = sources.pop(".".join(("ours", *map(str, path))))
        assert source.shape == leaf.get_value().shape
        array = np.empty(source.shape, np.float32)
        for piece in source.pieces:
            assert tensors[piece.tensor].shape == piece.tensor_shape
            run = tensors[piece.tensor].reshape(-1)[piece.start : piece.start + math.prod(piece.shape)]
            piece.view(array)[:] = run.reshape(piece.shape)
        arrays.append(jnp.asarray(array, source.dtype or spec.dtype))
    assert not sources
    return nnx.graph.unflatten(graphdef, arrays)
