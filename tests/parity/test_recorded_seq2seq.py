"""A decoder with an encoder against recorded logits, without torch."""

import numpy as np

import ef_jax
from tests.parity import grades, seq2seq


def test_recorded_logits(grade: grades.Grade) -> None:
    lm = ef_jax.load(seq2seq.FIXTURE, dtype="float32", context=seq2seq.CONTEXT, expert_fraction=0.25, progress=False)
    expected = np.load(seq2seq.FIXTURE / "expected.npz")
    logits = lm.logits(expected["prompt"], expected["text"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4 * expected["logits"].std(), rtol=0)
    assert lm.stats.slots < lm.stats.experts
    assert sum(lm.stats.prefill.misses) > 0 < sum(lm.stats.decode.misses)
    grade("switch_transformers", "recorded", seq2seq.FIXTURE.name)
