"""An engine with a routing-path predictor: its groups, what its predictor hears, and that no bit changes."""

import numpy as np
import pytest
from flax import nnx

import ef_jax
from ef_jax.errors import InputError
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.fingerprint import model_fingerprint
from ef_jax.predict.predictor_file import save_predictor
from ef_jax.schedule.token_scheduler import regroup

PROMPTS = [np.arange(20 + 300 * i, 24 + 301 * i, dtype=np.int32) for i in range(5)]
SETTINGS = {"expert_fraction": 0.25, "batch": 2, "context": 64, "chunk": 16, "emulate_link": "1GB/s"}


@pytest.fixture(scope="module")
def plain():
    lm = ef_jax.load(**{**SETTINGS, "expert_fraction": 1.0})
    return lm, lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(plain, tmp_path_factory):
    lm, _ = plain
    spec = RoutingPathSpec(layers=8, experts=32, top_k=4, vocab=4096, d_model=16, d_ff=32, heads=2)
    where = tmp_path_factory.mktemp("path") / "p"
    fingerprint = model_fingerprint(lm.spec, lm._engine.dense.routers(lm.spec))
    trained = RoutingPath(spec, rngs=nnx.Rngs(0))
    save_predictor(where, trained, fingerprint=fingerprint, model="small", training={})
    return where


def test_groups_go_by_paths_and_change_no_bit(plain, path, monkeypatch):
    lm = ef_jax.load(sequences=4, policy="plec", routing_path=path, prefetch=2, **SETTINGS)
    engine, begun, stepped, grouped = lm._engine, [], [], []
    begin_step, step, paths = engine.scheduler.begin_step, engine.step, engine.paths

    def hear(tokens, ahead=None, **others):
        begun.append(others)
        begin_step(tokens, ahead, **others)

    def run(rows, then=()):
        stepped.append((list(rows), list(then)))
        return step(rows, then)

    def told(rows):
        bins = paths(rows)
        grouped.append([sorted(rows[place] for place in group) for group in regroup(bins, 2)])
        return bins

    monkeypatch.setattr(engine.scheduler, "begin_step", hear)
    monkeypatch.setattr(engine, "step", run)
    monkeypatch.setattr(engine, "paths", told)
    outputs = lm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    for ours, expected in zip(outputs, plain[1], strict=True):
        assert (ours.tokens, ours.logprobs) == (expected.tokens, expected.logprobs)
    assert lm.stats.decode.bytes_demand > 0
    assert lm.stats.decode.bytes_prefetch > 0
    assert all(others["paths"].shape == (8, 32) for others in begun)
    assert any(others["following"] is not None for others in begun)
    assert all(
        (others["following"] is not None) == bool(then) for others, (_, then) in zip(begun, stepped, strict=True)
    )
    full = [group for groups in grouped for group in groups if len(group) == 2]
    assert full
    assert all(group in [rows for rows, _ in stepped] for group in full)


def test_what_cannot_take_effect_is_refused(path):
    options = {**SETTINGS, "emulate_link": None, "routing_path": path}
    with pytest.raises(InputError, match="cannot take effect"):
        ef_jax.load(**options)
    with pytest.raises(InputError, match="no directory of a trained predictor"):
        ef_jax.load(**{**options, "routing_path": path / "nowhere"})
    with pytest.raises(InputError, match="sequences must be between batch, 2"):
        ef_jax.load(sequences=1, **SETTINGS)
    assert ef_jax.load(policy="plec", **options)._engine.scheduler.hears


def test_the_plan_counts_rows_and_predictor(path):
    few, many = (ef_jax.load(sequences=count, **SETTINGS).plan for count in (2, 6))
    assert many.kv_cache == 3 * few.kv_cache
    assert (many.rows, many.batch) == (6, 2)
    told = ef_jax.load(sequences=6, routing_path=path, **SETTINGS).plan
    assert told.look_ahead > many.look_ahead
