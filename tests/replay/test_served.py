"""Serving the sequences of a trace on a virtual clock."""

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.predict import History
from ef_jax.predict.log_odds import union_bins
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.roofline import Roofline
from ef_jax.replay.served import Served
from ef_jax.replay.simulator import Replay
from ef_jax.replay.trace import Pass
from ef_jax.sampling_options import SamplingOptions
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.token_scheduler import regroup
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.output import Output
from ef_jax.serving.request import Request
from tests.replay.traces import made_up

BLOCK = 1000
TRACE = made_up(sequences=6, length=30, layers=3, experts=16, top_k=2, block_bytes=BLOCK)
COSTS = Roofline(
    flops=1e9, bandwidth=1e7, dispatch=1e-4, dense_bytes=4000, block_bytes=BLOCK, cache_bytes=10, top_k=TRACE.top_k
)


def replay(trace=TRACE, slots=12, predictor=None, **settings):
    return Replay(
        layers=trace.layers,
        experts=trace.num_experts,
        slots=slots,
        staging_slots=16,
        block_bytes=BLOCK,
        link=LinkModel(bandwidth=1e7),
        predictor=predictor,
        **settings,
    )


def served(trace=TRACE, **settings):
    engine = settings.pop("replay", None) or replay(trace)
    return Served(trace, engine, COSTS, **{"rows": 4, "batch": 2, "chunk": 16, **settings})


def request(sequence, prompt, count, trace=TRACE):
    first = int(trace.offsets[sequence])
    options = SamplingOptions(max_new_tokens=count)
    output = Output(None, options, eos=(), limit=count)
    return Request(trace.tokens[first : first + prompt], options, output, draw=sequence)


def join(stepper, row, sequence, prompt, count=1, trace=TRACE):
    wanted = request(sequence, prompt, count, trace)
    stepper.join(row, wanted.prompt, wanted.options, wanted.draw)


@pytest.mark.parametrize("grouping", [None, regroup])
@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (4, 2), (4, 4), (5, 2)])
def test_requests_get_the_tokens_of_their_sequences(rows, batch, grouping):
    paths = np.random.default_rng(0).integers(0, 256, (TRACE.count, TRACE.layers, TRACE.num_experts), np.uint8)
    stepper = served(rows=rows, batch=batch, paths=paths)
    engine = BatchEngine(stepper, regroup=grouping)
    requests = [request(index % 6, 3 + 4 * index % 20, 1 + 3 * index % 7) for index in range(9)]
    engine.submit(requests)
    while not engine.idle:
        engine.turn()
    for one in requests:
        first = int(TRACE.offsets[one.draw]) + len(one.prompt)
        assert one.output.tokens == TRACE.tokens[first : first + one.output.limit].tolist()
        assert one.error is None
    stats = stepper.replay.stats
    assert stats.prefill.tokens == sum(len(one.prompt) for one in requests)
    assert stats.decode.tokens == sum(one.output.limit - 1 for one in requests)
    assert stepper.replay.now == pytest.approx(stats.prefill.seconds + stats.decode.seconds)


def test_a_request_alone_is_a_prompt_and_steps_of_a_replay():
    stepper = served(rows=1, batch=1)
    engine = BatchEngine(stepper)
    engine.submit([request(2, 10, 8)])
    while not engine.idle:
        engine.turn()
    by_hand = replay()
    first = int(TRACE.offsets[2])
    for begin, end in ((0, 10), *((at, at + 1) for at in range(10, 17))):
        index = np.arange(first + begin, first + end)
        routes = TRACE.experts[index]
        counts = np.stack([np.bincount(routes[:, layer].ravel(), minlength=16) for layer in range(3)])
        seconds = COSTS.layer_seconds(tokens=end - begin, positions=end, experts=np.count_nonzero(counts, axis=1))
        prompt, tokens = end - begin > 1, TRACE.tokens[index].tolist()
        part = Pass(prompt, index.tolist(), tokens, (), routes.transpose(1, 0, 2).tolist(), counts if prompt else None)
        by_hand.run(part, seconds=seconds.tolist())
    by_hand.end_run()
    assert stepper.replay.stats.as_dict() == by_hand.stats.as_dict()
    assert by_hand.stats.decode.misses != [0, 0, 0]
    np.testing.assert_array_equal(stepper.replay.residency.slot_of, by_hand.residency.slot_of)


@pytest.mark.parametrize("staging", [True, False])
def test_prompts_leave_a_full_cache_alone_where_they_are_staged(staging):
    engine = replay(slots=9)
    engine.residency.policy.floor_share = 0.0
    stepper = served(replay=engine, staging=staging)
    for layer in range(3):
        engine.residency.seed(layer, [13, 14, 15])
    before = engine.residency.slot_of.copy()
    join(stepper, 0, 0, 16)
    assert stepper.prompt_pass(16, [(0, 0)]) == {0: (int(TRACE.tokens[16]), 0.0)}
    assert (engine.residency.slot_of == before).all() == staging
    assert (engine.stats.prefill.tokens, engine.stats.decode.tokens) == ((16, 0) if staging else (0, 16))


def test_chunks_and_lanes():
    stepper = served(chunk=64, pass_tokens=128)
    assert stepper.cuts(64) == [(0, 64)]
    assert stepper.cuts(85) == [(0, 64), (64, 64)]
    assert stepper.cuts(70) == [(0, 64), (64, 16)]
    assert stepper.cuts(3) == [(0, 4)]
    assert [stepper.lanes(width) for width in (4, 16, 64)] == [32, 8, 2]
    assert served(chunk=64).lanes(64) == 1


def test_prompts_of_several_chunks_share_passes():
    stepper = served(chunk=16, pass_tokens=32)
    join(stepper, 0, 0, 20)
    join(stepper, 1, 1, 16)
    first = int(TRACE.offsets[1])
    assert stepper.prompt_pass(16, [(0, 0), (1, 0)]) == {1: (int(TRACE.tokens[first + 16]), 0.0)}
    assert stepper.prompt_pass(4, [(0, 16)]) == {0: (int(TRACE.tokens[20]), 0.0)}
    assert stepper.replay.stats.prefill.tokens == 36


def test_predictors_hear_what_the_tokens_of_a_step_are_predicted_to_use():
    class Ear(History):
        def __init__(self):
            super().__init__(layers=3, experts=16)
            self.tokens, self.paths, self.bins = [], [], []

        def on_step(self, tokens):
            super().on_step(tokens)
            self.tokens.append(list(tokens))

        def on_paths(self, bins, following=None):
            self.paths.append(bins)

        def on_ahead(self, layer, bins):
            self.bins.append(bins)

    trace = made_up(layers=3, experts=16, pregate=2, block_bytes=BLOCK)
    paths = np.random.default_rng(0).integers(0, 256, (trace.count, 3, 16), np.uint8)
    pregate = PregateBins(trace)
    ear = Ear()
    stepper = served(trace, replay=replay(trace, predictor=ear), paths=paths, pregate=pregate)
    join(stepper, 1, 4, 5, 3, trace)
    join(stepper, 3, 0, 5, 3, trace)
    stepper.prompt_pass(16, [(1, 0), (3, 0)])
    assert not ear.tokens
    index = [int(trace.offsets[4]) + 5, 5]
    np.testing.assert_array_equal(stepper.paths([1, 3]), paths[index])
    stepper.step([1, 3])
    assert ear.tokens == [trace.tokens[index].tolist()]
    np.testing.assert_array_equal(ear.paths[0], union_bins(paths[index]))
    np.testing.assert_array_equal(ear.bins, pregate.of_step(index))
    np.testing.assert_array_equal(stepper.paths([3]), paths[[6]])
    assert served().paths([0]) is None


def test_rows_are_free_again():
    stepper = served()
    join(stepper, 0, 0, 3)
    stepper.leave(0)
    join(stepper, 0, 1, 3)
    join(stepper, 2, 2, 3)
    stepper.recover()
    join(stepper, 2, 5, 16, 4)
    assert stepper.prompt_pass(16, [(2, 0)]) == {2: (int(TRACE.tokens[TRACE.offsets[5] + 16]), 0.0)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 0}, "rows 0: give at least 1"),
        ({"batch": 0}, "batch 0"),
        ({"chunk": 0}, "chunk 0"),
        ({"rows": 1}, "1 rows for steps of 2"),
        ({"paths": np.zeros((3, 3, 16), np.uint8)}, r"paths are of shape \(3, 3, 16\)"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        served(**settings)


def test_requests_that_the_trace_does_not_have():
    stepper = served()
    options = SamplingOptions(max_new_tokens=5)
    with pytest.raises(InputError, match="sequence 6 of a trace of 6"):
        stepper.join(0, TRACE.tokens[:3], options, 6)
    with pytest.raises(InputError, match="not how sequence 1 of the trace begins"):
        stepper.join(0, TRACE.tokens[:3], options, 1)
    with pytest.raises(InputError, match=r"has 30 tokens, and the prompt of 26 .* ask for 4 at most"):
        stepper.join(0, TRACE.tokens[:26], options, 0)


def test_rooflines():
    costs = Roofline(flops=1e6, bandwidth=1e4, dispatch=0.5, dense_bytes=1000, block_bytes=200, cache_bytes=3, top_k=2)
    few = costs.layer_seconds(tokens=1, positions=100, experts=np.array([2, 4]))
    np.testing.assert_allclose(few, [0.5 + 0.17, 0.5 + 0.21])  # reading
    many = costs.layer_seconds(tokens=1000, positions=1000, experts=np.array([2, 4]))
    np.testing.assert_allclose(many, [0.5 + 1.4, 0.5 + 1.4])  # multiplying


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flops": 0.0}, "flops 0.0 a second"),
        ({"bandwidth": float("inf")}, "bandwidth inf"),
        ({"dispatch": -1.0}, "dispatch -1.0 s"),
        ({"block_bytes": -1}, "block_bytes -1"),
    ],
)
def test_bad_rooflines(change, words):
    figures = {"flops": 1.0, "bandwidth": 1.0, "dispatch": 0.0, "dense_bytes": 1, "block_bytes": 1, "cache_bytes": 1}
    with pytest.raises(InputError, match=words):
        Roofline(**{**figures, "top_k": 1, **change})
