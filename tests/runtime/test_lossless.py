"""Residency, policy, order, waves and copy mode change no bit of the logits, and bytes really move."""

import functools

import jax
import numpy as np
import pytest

import ef_jax
from bench import _run
from ef_jax.sampling_options import SamplingOptions

PROMPT = np.random.default_rng(0).integers(1, 4096, 75).astype(np.int32)


@functools.cache
def all_resident(batch: int, dtype: str | None):
    """The all-resident run's prompt logits, and tokens and logprobs of a decoded batch."""
    lm = load(1.0, batch, dtype)
    logits, decoded = lm.logits(PROMPT), decode(lm, batch)
    assert sum(lm.stats.as_dict()[name] for name in ("misses", "bytes_demand")) == 0
    assert lm.stats.slots == lm.stats.experts
    return logits, decoded


def load(fraction: float, batch: int, dtype: str | None = None, **options):
    return ef_jax.load(expert_fraction=fraction, batch=batch, context=128, chunk=64, dtype=dtype, **options)


def decode(lm, batch: int, steps: int = 12):
    """Tokens and logprobs of `batch` prompts of different lengths, sampled, through the engine itself."""
    prompts = [PROMPT[: 5 + 14 * i] for i in range(batch)]
    engine = lm._engine
    outputs = [_run.start(engine, prompts, SamplingOptions(temperature=1.0, seed=7), 128)]
    outputs += [engine.step(range(batch)) for _ in range(steps)]
    _run.stop(engine, batch)
    tokens, logprobs = np.moveaxis(np.array(outputs), 2, 0)
    return tokens.astype(int), logprobs.astype(np.float32)


@pytest.mark.parametrize(
    ("batch", "fraction", "options"),
    [
        (1, 0.25, {"policy": "lru"}),
        (1, 0.25, {"policy": "static"}),
        (1, 0.25, {"policy": "lru", "copy_mode": "async"}),
        (5, 0.25, {"policy": "lru"}),
        (5, 0.25, {"policy": "lru", "copy_mode": "async"}),
        (5, 0.0, {"policy": "lru"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_logits_are_the_all_resident_runs_bit_for_bit(batch, fraction, options):
    expected, (tokens, logprobs) = all_resident(batch, None)
    lm = load(fraction, batch, **options)
    logits = lm.logits(PROMPT)
    assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32))
    ours = decode(lm, batch)
    assert np.array_equal(ours[0], tokens)
    assert np.array_equal(ours[1].view(np.uint32), logprobs.view(np.uint32))
    stats = lm.stats.as_dict()
    assert stats["slots"] < stats["experts"]
    assert sum(stats["decode"]["misses"]) > 0
    assert stats["decode"]["bytes_demand"] == sum(stats["decode"]["misses"]) * lm.plan.block_bytes
    assert stats["bytes_demand"] + stats["bytes_prefetch"] == lm._engine.link.bytes_moved > 0
    assert (stats["bytes_prefetch"] > 0) == (lm.stats.horizon["off_because"] is None)


def test_the_smallest_budget_that_is_admitted_is_lossless_too():
    expected, (tokens, _) = all_resident(1, None)
    with pytest.raises(ef_jax.BudgetError, match="needs at least") as refused:
        ef_jax.load(device_memory=1_000_000, context=128, chunk=64)
    least = int(str(refused.value).split("needs at least ")[1].split()[0])
    lm = ef_jax.load(device_memory=least, context=128, chunk=64)
    assert (lm.plan.slots, lm.plan.staging_slots) == (0, 4)
    assert np.array_equal(lm.logits(PROMPT).view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(decode(lm, 1)[0], tokens)
    assert sum(lm.stats.decode.hits) == 0
    assert sum(lm.stats.decode.misses) == 12 * 8 * 4


def test_float32_is_lossless():
    expected, (tokens, logprobs) = all_resident(1, "float32")
    lm = load(0.25, 1, "float32")
    assert np.array_equal(lm.logits(PROMPT).view(np.uint32), expected.view(np.uint32))
    ours = decode(lm, 1)
    assert np.array_equal(ours[0], tokens)
    assert np.array_equal(ours[1].view(np.uint32), logprobs.view(np.uint32))
    assert lm.stats.as_dict()["misses"] > 0


@pytest.mark.gpu
def test_on_a_gpu():
    test_logits_are_the_all_resident_runs_bit_for_bit(5, 0.25, {"policy": "lru"})
    assert jax.default_backend() == "gpu"
