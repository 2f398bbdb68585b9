"""What a recorded trace says is what the engine did."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ef_jax
from ef_jax.errors import InputError
from ef_jax.nn import merge_top, pregate, stack_routers, top_definition
from ef_jax.replay.trace import DECODE, PROMPT, RoutingTrace

# 3, 45 and 7 tokens: with two at a time and chunks of 32, the second needs a second chunk, the third waits for a place.
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

    # A prompt pass and a step take turns: 0 prompt of the first, 1 step, 2 and 4 prompt of the second, then steps until
    # the first has ended (11) and the third has its place; 12 its prompt, and its steps beside the second's.
    assert trace.passes is not None
    first, second = [0], [2, 4]
    steps = [[1, 3, *range(5, 12)], [*range(5, 12), 13, 14], [*range(13, 22)]]
    for sequence, (length, chunks) in enumerate(zip(LENGTHS, (first, second, [12]), strict=True)):
        part = slice(trace.offsets[sequence], trace.offsets[sequence + 1])
        prompt = np.repeat(chunks, [min(32, length - 32 * i) for i in range(len(chunks))])
        assert trace.passes[part].tolist() == [*prompt, *steps[sequence]]
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


def test_pregate_scores_of_prompts_and_steps_are_the_same(prompts: list[list[int]]) -> None:
    lm = ef_jax.load(expert_fraction=0.25, batch=2, context=32, chunk=16, dtype="float32")
    decoded = generate(lm, [prompts[0], prompts[2]], pregate=3)[0]
    assert decoded.pregate is not None
    assert (decoded.pregate.dtype, decoded.pregate.shape) == (np.float16, (decoded.count, 8, 3, 32))
    with lm.trace(pregate=3) as recording:
        for q in range(2):
            lm.logits(decoded.select(q, q + 1).tokens)
    again = recording.trace().pregate
    np.testing.assert_allclose(again, decoded.pregate, atol=1e-3, rtol=2e-3)


def test_pregate_scores_see_what_layers_will_choose(lm: Any, prompts: list[list[int]]) -> None:
    trace = generate(lm, prompts, pregate=8)[0]
    assert trace.pregate is not None
    stack = stack_routers(lm.spec, lm._engine.dense.layers, 8)
    embedding = merge_top(top_definition(lm.spec)[0], lm._engine.dense.top).embed_tokens(jnp.asarray(trace.tokens))
    expected = pregate(lm.spec, stack, embedding, jnp.int32(0), 8)
    np.testing.assert_allclose(trace.pregate[:, 0], expected, atol=0.02)
    recalls = np.zeros((8, 8))
    for source in range(8):
        for target in range(source, 8):
            guess = np.argsort(-trace.pregate[:, source, target - source].astype(np.float32), axis=-1)[:, :4]
            hits = (guess[..., None] == trace.experts[:, target, None]).any(-1)
            recalls[source, target - source] = hits.mean()
        assert not trace.pregate[:, source, 8 - source :].any()
    assert (recalls[2:, 0] > 0.5).all()  # by chance 0.125
    assert recalls[2:6, 0].mean() > recalls[2:6, 1].mean() > recalls[2:6, 2].mean() > 0.3


def test_distances_that_no_source_has(lm: Any) -> None:
    for distances in (9, -1):
        with (
            pytest.raises(InputError, match=f"pre-gate scores {distances} layers ahead: give 1 to 8"),
            lm.trace(pregate=distances),
        ):
            pass
    assert lm._engine.recorder is None


def test_a_sequence_that_ends_leaves_its_batch(lm: Any, prompts: list[list[int]]) -> None:
    with lm.trace() as recording:
        results = lm.generate(prompts[:2], max_new_tokens=30, ignore_eos=True)
    assert [len(result.tokens) for result in results] == [30, 64 - 45]  # the context is full
    trace = recording.trace()
    assert np.diff(trace.offsets).tolist() == [3 + 29, 45 + 18]
    assert [len(step.rows) for step in trace.steps() if not step.prompt] == [1, 1] + [2] * 18 + [1] * 9


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
        for _ in range(4):
            next(stream)
        steps = lm.stats.decode.steps - before
        stream.close()
        lm.generate(prompts[0], max_new_tokens=2, ignore_eos=True)
    trace = recording.trace()
    assert steps > 0
    assert np.diff(trace.offsets).tolist() == [steps, 4]
    assert trace.phases.tolist() == [DECODE] * steps + [PROMPT] * 3 + [DECODE]
