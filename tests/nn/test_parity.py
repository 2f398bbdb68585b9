"""Whole small models against transformers, through the modules alone: every family, plainly and with features."""

import dataclasses
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
from tests.parity.families import FAMILIES, RECORDED, Changes, case_ids
from tests.parity.families._common import LLAMA3, YARN

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# Every family plainly, and with the features of its recorded cases; the engine's tests have all of LIVE.
CASES = tuple((name, 0, {}) for name in FAMILIES) + tuple(case for case in RECORDED.values() if case[2])

NEAR_TIE = 1e-5
"""Where a token's K-th and next router scores are closer than this, rounding decides which of the two is chosen."""


@pytest.mark.parametrize(("model_type", "seed", "changes"), CASES, ids=case_ids(CASES))
def test_logits_and_pregate(model_type: str, seed: int, changes: Changes) -> None:
    """Logits are those of transformers wherever the routing is decided by more than rounding.

    The routers' choices are compared through what they lead to. A token with a near-tie may go either way, and those
    after it see it, so a sequence is compared up to its first near-tie; nearly all of them have none. The pre-gate of
    a layer's own input, distance 0, chooses the layer's set of experts exactly: there nothing is left to rounding.
    """
    model = reference.torch_model(model_type, seed, **changes)
    spec = reference.spec_of(model)
    ours = reference.Model(model, spec, context=24, batch=2)
    ids = np.random.default_rng(seed).integers(0, spec.vocab, (2, 17))
    expected = reference.torch_logits(model, ids)
    assert 0.3 < expected.std() < 3
    logits = ours(ids, np.broadcast_to(np.arange(17), ids.shape))
    assert ours.shapes == {path: (leaf.shape, leaf.dtype) for path, leaf in nn.dense_shapes(spec).items()}

    scores, chosen = ours.choices()
    ranked = np.argsort(-scores, axis=-1, kind="stable")[..., : spec.experts.top_k + 1]
    np.testing.assert_array_equal(np.sort(ranked[..., :-1]), np.sort(chosen))
    by_rank = np.take_along_axis(scores, ranked, axis=-1)
    decided = (by_rank[..., -2] - by_rank[..., -1] > NEAR_TIE).all(axis=0)
    compared = np.logical_and.accumulate(decided, axis=1)
    assert compared.mean() > 0.8
    np.testing.assert_allclose(logits[compared], expected[compared], atol=FAMILIES[model_type].tolerance, rtol=0)


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
    spec = dataclasses.replace(reference.spec_of(model), dtype="bfloat16")
    ours = reference.Model(model, spec, context=64)
    assert ours.layers[0].attn.o_proj.weight[...].dtype == jax.numpy.bfloat16
    logits = ours(ids, np.arange(ids.shape[1])[None])[0]
    expected = reference.torch_logits(model, ids)[0]
    # bfloat16 keeps 8 bits: rounding alone moves logits of this size by some hundredths.
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.9
