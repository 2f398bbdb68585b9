"""What a recorded trace says is what the engine did."""

from typing import Any

import numpy as np
import pytest

import ef_jax
from ef_jax.errors import InputError
from ef_jax.replay.trace import DECODE, PROMPT, RoutingTrace

# 3, 45 and 7 tokens: with two to a batch and chunks of 32, the second needs a second chunk, the third runs alone.
LENGTHS = (3, 45, 7)
SETTINGS = {"batch": 2, "context": 64, "chunk": 32}


@pytest.fixture(scope="module")
def lm() -> Any:
    return ef_jax.load(expert_fraction=0.25, **SETTINGS)


@pytest.fixture(scope="module")
def prompts(lm: Any) -> list[list[int]]:
    text = (lm.path / "valid" / "bible.txt").read_text()
    ids = lm.tokenizer.encode(text[:400])
    return [list(ids[:length]) for length in LENGTHS]


def generate(lm: Any, prompts: list[list[int]], **settings: Any) -> tuple[RoutingTrace, list[Any]]:
    lm.stats.reset()
    with lm.trace(**settings) as recording:
        results = lm.generate(prompts, max_new_tokens=10, ignore_eos=True)
    return recording.trace(), results


def test_sequences_phases_and_passes(lm: Any, prompts: list[list[int]]) -> None:
    trace, results = generate(lm, prompts)
    expected = [[*prompt, *result.tokens[:-1]] for prompt, result in zip(prompts, results, strict=True)]
    assert [trace.select(q, q + 1).tokens.tolist() for q in range(3)] == expected
    assert (trace.layers, trace.num_experts, trace.top_k) == (8, 32, 4)
    assert (trace.model, trace.block_bytes) == ("small_moe", lm.plan.block_bytes)
    assert trace.experts.dtype == np.uint8
    assert trace.weights is None

    assert trace.passes is not None
    for sequence, (length, passes) in enumerate(zip(LENGTHS, ([0], [0, 1], [11]), strict=True)):
        part = slice(trace.offsets[sequence], trace.offsets[sequence + 1])
        first_step = 12 if sequence == 2 else 2
        chunks = np.repeat(passes, [min(32, length - 32 * i) for i in range(len(passes))])
        assert trace.passes[part].tolist() == [*chunks, *range(first_step, first_step + 9)]
        assert trace.phases[part].tolist() == [PROMPT] * length + [DECODE] * 9


def test_every_expert_that_the_engine_counts(lm: Any, prompts: list[list[int]]) -> None:
    trace, _ = generate(lm, prompts)
    used = {True: np.zeros(8, int), False: np.zeros(8, int)}
    for step in trace.steps():
        if step.counts is not None:
            used[True] += (step.counts > 0).sum(axis=1)
        else:
            used[False] += [len(set(np.ravel(rows).tolist())) for rows in step.routes]
    for phase, counters in ((True, lm.stats.prefill), (False, lm.stats.decode)):
        assert used[phase].tolist() == [h + m for h, m in zip(counters.hits, counters.misses, strict=True)]
        assert counters.steps == sum(step.prompt == phase for step in trace.steps())


def test_recording_changes_nothing_and_ends(lm: Any, prompts: list[list[int]]) -> None:
    recorded = generate(lm, prompts)[1]
    plain = lm.generate(prompts, max_new_tokens=10, ignore_eos=True)
    assert [(r.tokens, r.logprobs) for r in recorded] == [(r.tokens, r.logprobs) for r in plain]
    with lm.trace() as recording:
        with pytest.raises(InputError, match="a trace is being recorded already"), lm.trace():
            pass
        with pytest.raises(InputError, match="nothing was recorded"):
            recording.trace()
    lm.logits(prompts[0])
    with pytest.raises(InputError, match="nothing was recorded"):
        recording.trace()


def test_an_all_resident_run_records_the_same(lm: Any, prompts: list[list[int]]) -> None:
    resident = ef_jax.load(expert_fraction=1.0, **SETTINGS)
    ours, theirs = (generate(model, prompts, weights=True)[0] for model in (lm, resident))
    for name in ("experts", "tokens", "offsets", "phases", "passes", "weights"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_weights_are_the_routers_in_its_order(lm: Any, prompts: list[list[int]]) -> None:
    weights = generate(lm, prompts, weights=True)[0].weights
    assert weights is not None
    assert weights.dtype == np.float16
    assert (np.diff(weights, axis=-1) <= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1, dtype=np.float32), 1, atol=0.02)


def test_a_sequence_that_ends_leaves_its_batch(lm: Any, prompts: list[list[int]]) -> None:
    with lm.trace() as recording:
        results = lm.generate(prompts[:2], max_new_tokens=30, ignore_eos=True)
    assert [len(result.tokens) for result in results] == [30, 64 - 45]  # the context is full
    trace = recording.trace()
    assert np.diff(trace.offsets).tolist() == [3 + 29, 45 + 18]
    assert [len(step.rows) for step in trace.steps() if not step.prompt] == [2] * 18 + [1] * 11


def test_teacher_forced_passes_are_prompts(lm: Any, prompts: list[list[int]]) -> None:
    with lm.trace() as recording:
        lm.logits(prompts[1])
        lm.score([prompts[0], prompts[2]])
    trace = recording.trace()
    assert np.diff(trace.offsets).tolist() == [45, 3, 7]
    assert not trace.phases.any()
    assert trace.passes is not None
    assert trace.passes.tolist() == [0] * 32 + [1] * 13 + [2] * 3 + [3] * 7


def test_recording_may_begin_in_a_stream_and_go_on_after_it(lm: Any, prompts: list[list[int]]) -> None:
    stream = lm.stream(prompts[2], max_new_tokens=64 - 7, ignore_eos=True)
    next(stream)
    with lm.trace() as recording:
        before = lm.stats.decode.steps
        next(stream)
        steps = lm.stats.decode.steps - before
        stream.close()
        lm.generate(prompts[0], max_new_tokens=2, ignore_eos=True)
    trace = recording.trace()
    assert np.diff(trace.offsets).tolist() == [steps, 4]
    assert trace.phases.tolist() == [DECODE] * steps + [PROMPT] * 3 + [DECODE]
