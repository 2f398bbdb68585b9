"""Phi-3.5-MoE beyond its original context, where transformers 5.23 leaves out the long factors of its rope."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import ef_jax
from tests.nn import reference
from tests.parity.cases import CHUNK, TOKENS
from tests.parity.families import phimoe

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_the_context_that_is_loaded_chooses_the_factors(tmp_path: Path) -> None:
    """With a seed whose logits are nowhere near the sparse mixer's threshold: there rounding decides who takes part."""
    rope = phimoe.SHORT | {"original_max_position_embeddings": TOKENS}
    model = reference.torch_model("phimoe", 7, rope_parameters=rope, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(7).integers(0, model.config.vocab_size, TOKENS)
    short = reference.torch_logits(model, ids[None])[0]
    embedding = model.model.rotary_emb
    embedding.rope_init_fn = functools.partial(embedding.rope_init_fn, seq_len=TOKENS + 1)
    embedding.config.rope_parameters["short_mscale"] = rope["long_mscale"]  # it goes by the length of the prompt
    long = reference.torch_logits(model, ids[None])[0]
    assert np.abs(long - short).max() > 0.05
    for context, expected in ((TOKENS, short), (TOKENS + 1, long)):
        lm = ef_jax.load(tmp_path, context=context, chunk=CHUNK, expert_fraction=0.5, progress=False)
        np.testing.assert_allclose(lm.logits(ids), expected, atol=2e-4, rtol=0)
