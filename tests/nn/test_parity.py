"""Whole small models against transformers: every family, every optional feature, several seeds."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from ef_jax import nn
from ef_jax.families import spec_from_config
from tests.nn import reference
from tests.parity.cases import LLAMA3, YARN

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    ("qwen3_moe", {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    ("qwen3_moe", {"rope_parameters": YARN}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "rope_parameters": LLAMA3}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 6, "tie_word_embeddings": True}),
    ("mixtral", {"head_dim": 12, "num_key_value_heads": 4}),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("olmoe", {}),
    ("olmoe", {"clip_qkv": 0.7, "norm_topk_prob": True}),
    ("olmoe", {"attention_bias": True, "hidden_act": "gelu"}),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=[f"{name}-{'-'.join(more)}" for name, more in CASES])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits(model_type: str, changes: dict[str, Any], seed: int) -> None:
    model = reference.torch_model(model_type, seed, **changes)
    spec = reference.spec_of(model)
    ours = reference.Model(model, spec, context=24, batch=2)
    ids = np.random.default_rng(seed).integers(0, spec.vocab, (2, 17))
    expected = reference.torch_logits(model, ids)
    assert 0.3 < expected.std() < 3
    positions = np.broadcast_to(np.arange(17), ids.shape)
    np.testing.assert_allclose(ours(ids, positions), expected, atol=2e-4, rtol=0)
    assert ours.shapes == {path: (leaf.shape, leaf.dtype) for path, leaf in nn.dense_shapes(spec).items()}


@pytest.mark.parametrize("kind", ["linear", "yarn", "yarn_plain", "llama3"])
def test_rope_frequencies(kind: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, dict[str, Any]] = {
        "linear": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "yarn": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 16, "beta_slow": 2},
        "yarn_plain": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
        "llama3": LLAMA3,
    }
    import transformers

    config = transformers.AutoConfig.for_model(
        "qwen3_moe", head_dim=128, max_position_embeddings=256, rope_parameters=dict(parameters[kind])
    )
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    rope = spec_from_config(json.loads(config.to_json_string())).attention.rope
    frequencies, our_factor = nn.rope_frequencies(rope)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert our_factor == pytest.approx(factor)


def test_bundled_model_in_bfloat16(small_moe: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        small_moe, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_moe)
    text = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +"
    ids = np.asarray([tokenizer(text)["input_ids"]])
    ours = reference.Model(model, reference.spec_of(model), context=64)
    assert ours.layers[0].attn.o_proj.weight[...].dtype == jax.numpy.bfloat16
    logits = ours(ids, np.arange(ids.shape[1])[None])[0]
    expected = reference.torch_logits(model, ids)[0]
    # bfloat16 keeps 8 bits: rounding alone moves logits of this size by some hundredths.
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.9
