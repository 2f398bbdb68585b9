"""What the programs say of coming layers is what those layers' routers make of the residual stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ef_jax
from bench import _run
from ef_jax.loading import bundled_model
from ef_jax.nn.correction import Correction, CorrectionSpec, advance, begin
from ef_jax.nn.pregate import pregate
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.log_odds import log_odds, to_bins, union
from ef_jax.predict.predictor_file import save_predictor
from ef_jax.runtime.look_ahead import token_diversity
from ef_jax.sampling_options import SamplingOptions

PROMPTS = [np.arange(20, 30, dtype=np.int32), np.arange(400, 425, dtype=np.int32)]


def decoding(lm, steps: int):
    """Run prompts and some steps of an engine by hand; returns what the scheduler and the programs were given."""
    engine, asked, begun, streams = lm._engine, [], [], []
    ask, begin_step, serve = engine.scheduler.ask, engine.scheduler.begin_step, engine._serve

    def hear_ask(layer, rows, ahead=None, **others):
        asked.append((layer, rows, ahead))
        return ask(layer, rows, ahead, **others)

    def hear_begin(tokens, ahead=None, **others):
        begun.append((tokens, ahead, others))
        begin_step(tokens, ahead, **others)

    def hear_serve(deferred, index, routed):
        streams.append((index, np.asarray(routed.x), np.asarray(routed.ids)))
        return serve(deferred, index, routed)

    engine.scheduler.ask, engine.scheduler.begin_step, engine._serve = hear_ask, hear_begin, hear_serve
    prompts = PROMPTS[: lm.plan.batch]
    for prompt in prompts:
        engine.prepare(len(prompt), 64)
    compiled = engine.programs.count
    _run.start(engine, prompts, SamplingOptions(), 64)
    for _ in range(steps):
        engine.step(range(len(prompts)))
    _run.stop(engine, len(prompts))
    assert engine.programs.count == compiled
    return asked, begun, streams


@pytest.mark.parametrize("batch", [1, 2])
def test_reports_are_the_pregates(batch):
    lm = ef_jax.load(expert_fraction=0.25, batch=batch, context=64, chunk=32, prefetch=2, emulate_link="1GB/s")
    asked, begun, streams = decoding(lm, 3)
    engine, spec = lm._engine, lm.spec
    distances, layers = engine.lookout.look_ahead.spec.distances, len(spec.moe_layers)
    stack = engine.lookout.look_ahead.looks[0].stack
    run = jax.jit(lambda x, first, count: pregate(spec, stack, x, first, count), static_argnums=2)
    active = np.ones(batch, bool)
    for (layer, rows, bins), (index, x, ids) in zip(asked, streams, strict=True):
        assert (layer, rows) == (index, ids[:, 0].tolist())
        assert bins.shape == (distances + 1, spec.experts.count)
        assert set(np.flatnonzero(bins[0] >= 128)) == set(ids.ravel())  # distance 0 is the layer's own choice
        choice = np.asarray(run(x[:, 0], np.int32(layer), distances + 1))
        expected = to_bins(union(log_odds(choice[:, 1:], spec.experts.top_k, np), active, np), np)
        known = slice(0, max(0, layers - 1 - layer))
        assert np.abs(bins[1:][known].astype(int) - expected[known].astype(int)).max(initial=0) <= 1
    embed = np.asarray(engine._dense.top[0])
    for tokens, bins, others in begun:
        x = embed[tokens]
        choice = np.asarray(run(x, np.int32(0), distances))
        expected = to_bins(union(log_odds(choice, spec.experts.top_k, np), active, np), np)
        assert np.abs(bins[1:].astype(int) - expected.astype(int)).max() <= 1
        pairs = sum(np.square((a - b).astype(np.float32)).sum() for i, a in enumerate(x) for b in x[:i])
        assert others["diversity"] == pytest.approx(pairs, rel=1e-2, abs=1e-3)
    assert lm.stats.decode.bytes_prefetch > 0


def test_a_trained_predictor_knows_the_prompt_and_changes_no_token(tmp_path):
    plain = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    expected = plain.generate([PROMPTS[1]], max_new_tokens=8)
    spec = CorrectionSpec(layers=8, experts=32, top_k=4, distances=3, vocab=4096, width=8)
    correction = Correction(spec, rngs=nnx.Rngs(0))
    fingerprint = model_fingerprint(plain.spec, plain._engine.dense.routers(plain.spec))
    save_predictor(tmp_path / "p", correction, fingerprint=fingerprint, model="small", training={})
    options = {"context": 64, "chunk": 16, "emulate_link": "1GB/s", "predictor": tmp_path / "p"}
    lm = ef_jax.load(expert_fraction=0.25, prefetch=3, **options)
    after = lm.generate([PROMPTS[1]], max_new_tokens=8)
    assert (after[0].tokens, after[0].logprobs) == (expected[0].tokens, expected[0].logprobs)
    assert lm.stats.decode.bytes_prefetch > 0
    assert lm.stats.recall["recall"][0] == 1.0

    engine = lm._engine
    with lm.trace() as recording:
        [(first, _)] = _run.start(engine, [PROMPTS[1]], SamplingOptions(), 64)
    state = jnp.zeros((1, spec.state_width))
    for row, token in zip(recording.trace().experts.astype(np.int32), PROMPTS[1], strict=True):
        state = begin(spec, correction.common, jnp.array([token]), state)
        for layer in range(8):
            state = advance(spec, correction.common, state, jnp.int32(layer), jnp.asarray(row[None, layer]))
    state = begin(spec, correction.common, jnp.array([first]), state)
    np.testing.assert_allclose(engine.lookout.look_ahead.state, state, rtol=1e-4, atol=1e-5)
    _run.stop(engine, 1)

    other = ef_jax.load(bundled_model(), expert_fraction=1.0, **options)
    assert "on the device" in other._engine._off_because
    save_predictor(tmp_path / "q", correction, fingerprint="0" * 32, model="another", training={})
    with pytest.raises(ef_jax.InputError, match="other routers"):
        ef_jax.load(expert_fraction=0.25, **{**options, "predictor": tmp_path / "q"})


def test_diversity_counts_active_tokens_only():
    rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    active = np.array([True, False, True, True])
    expected = sum(np.square(rows[i] - rows[j]).sum() for i in (0, 2, 3) for j in (0, 2, 3) if i < j)
    assert float(token_diversity(jnp.asarray(rows), jnp.asarray(active))) == pytest.approx(float(expected), rel=1e-5)


def test_the_plan_accounts_for_it():
    on = ef_jax.load(expert_fraction=0.25, context=64, chunk=16, emulate_link="1GB/s")
    off = ef_jax.load(expert_fraction=0.25, context=64, chunk=16, emulate_link="1GB/s", prefetch="off")
    arrays = jax.tree.leaves([look.stack for look in on._engine.lookout.look_ahead.looks[:1]])
    assert on.plan.look_ahead >= sum(array.nbytes for array in arrays) > 0
    assert off.plan.look_ahead == 0


def test_a_calibrated_pregate_says_something_else_and_changes_no_token():
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16, prefetch=2, emulate_link="1GB/s")
    before = lm.generate([PROMPTS[1]], max_new_tokens=8)
    plain = lm._engine.scheduler.stats.recall
    lm.calibrate_pregate(["Shall I compare thee to a summer's day? Thou art more lovely and more temperate."])
    assert float(abs(lm._engine.lookout.look_ahead.looks[1].shift).max()) > 0
    compiled = lm._engine.programs.count
    after = lm.generate([PROMPTS[1]], max_new_tokens=8)
    assert lm._engine.programs.count == compiled
    assert (after[0].tokens, after[0].logprobs) == (before[0].tokens, before[0].logprobs)
    assert plain["recall"][0] == 1.0 == lm.stats.recall["recall"][0]
    off = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    with pytest.raises(ef_jax.InputError, match="no pre-gate"):
        off.calibrate_pregate("some text")


def test_programs_stop_looking_ahead_where_it_does_not_pay(monkeypatch):
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16, emulate_link="1GB/s")
    before = lm.generate([PROMPTS[1]], max_new_tokens=8)
    scheduler = lm._engine.scheduler
    pieces = lm.stream(PROMPTS[1], max_new_tokens=8)
    text = next(pieces)
    monkeypatch.setattr(scheduler._trial, "_choice", False)  # a trial ends in mid-run
    monkeypatch.setattr(scheduler._trial, "because", "a step took longer with it")
    text += "".join(pieces)
    assert text == before[0].text
    assert lm._engine.lookout.running.look_ahead is None
    lm.stats.reset()
    after = lm.generate([PROMPTS[1]], max_new_tokens=8)
    assert lm._engine.lookout.running.look_ahead is None
    assert (after[0].tokens, after[0].logprobs) == (before[0].tokens, before[0].logprobs)
    assert lm.stats.decode.bytes_prefetch == 0
    assert lm.stats.horizon["off_because"] == "a step took longer with it"
    monkeypatch.setattr(scheduler._trial, "_wait", 0)
    again = lm.generate([PROMPTS[1]], max_new_tokens=8)
    assert lm._engine.lookout.running.look_ahead is not None
    assert again[0].tokens == before[0].tokens
    assert lm.stats.decode.bytes_prefetch > 0
