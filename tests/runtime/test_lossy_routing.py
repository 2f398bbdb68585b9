"""Runs that drop experts, or choose those that have slots: off, they change nothing; on, fewer bytes move."""

import argparse
import itertools
import json
import re

import jax
import numpy as np
import pytest

import ef_jax
from bench.make_synthetic import Synthetic, write_synthetic
from ef_jax.cli import options as common
from ef_jax.cli.generate import run as generate
from ef_jax.lossy import LossyOptions
from ef_jax.runtime.expert_kernels import choose_kernels
from ef_jax.runtime.programs import Programs
from ef_jax.weights import open_checkpoint

PROMPTS = [[5, 9, 2, 7, 1], [11, 3]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("lossy") / "model"
    write_synthetic(path, Synthetic(hidden=32, width=16, experts=16, top_k=4, layers=2, vocab=64))
    return path


def load(path, fraction=0.25, **options):
    return ef_jax.load(path, expert_fraction=fraction, context=32, chunk=16, progress=False, **options)


def run(lm, new=12):
    results = lm.generate(PROMPTS, max_new_tokens=new, ignore_eos=True)
    return [(result.tokens, result.logprobs) for result in results], lm.stats.decode


@pytest.fixture(scope="module")
def lossless(path):
    lm = load(path)
    results, phase = run(lm)
    assert lm.stats.lossy is None
    assert lm.stats.slots < lm.stats.experts
    assert phase.bytes_demand > 0
    return results, phase.bytes_demand


def test_a_bias_of_nothing_gives_the_lossless_runs_bits(path, lossless):
    lm = load(path, lossy_cache_bias=0.0)
    results, phase = run(lm)
    assert (results, phase.bytes_demand) == lossless
    assert lm.stats.lossy == {"lossy_cache_bias": 0.0}


@pytest.mark.parametrize("options", [{}, {"batch": 2, "emulate_link": "1GB/s", "prefetch": 2}], ids=str)
def test_dropped_experts_are_not_asked_for_in_steps_and_prompts(path, options):
    lm = load(path, lossy_adaptive_experts=0.01, **options)
    _, phase = run(lm)
    needed = [sum(counts) for counts in zip(phase.hits, phase.late_hits, phase.misses, strict=True)]
    assert max(needed) <= phase.tokens  # one expert a token
    assert min(needed) >= phase.steps
    prefill = lm.stats.prefill
    assert sum(prefill.hits) + sum(prefill.misses) <= 2 * prefill.tokens
    assert phase.bytes_moved > 0


def test_a_high_bias_stays_with_what_is_held_and_moves_no_byte(path, lossless):
    lm = load(path, lossy_cache_bias=64.0)
    lm.generate([PROMPTS[0]], max_new_tokens=8, ignore_eos=True)
    lm.stats.reset()
    results, phase = run(lm)
    assert phase.bytes_demand == 0
    assert sum(phase.hits) == 4 * 2 * phase.tokens
    assert results != lossless[0]


def test_a_text_is_scored_by_steps_as_by_prompts_and_steps_feel_what_acts_on_them(path):
    ids = np.random.default_rng(0).integers(0, 64, 20)
    lm = load(path)
    (prompt,), before = lm.score([ids]), lm.stats.decode.tokens
    (steps,) = lm.score([ids], by_steps=True)
    assert steps.tokens == prompt.tokens == lm.stats.decode.tokens - before == 19
    assert steps.logprob == pytest.approx(prompt.logprob, rel=1e-2)
    biased = load(path, lossy_cache_bias=64.0)
    assert biased.score([ids])[0] == prompt
    assert biased.score([ids], by_steps=True)[0].logprob != steps.logprob
    assert lm.score([ids[:1]], by_steps=True)[0].tokens == 0


def test_reports_say_what_may_change(path, tmp_path, capsys):
    lm = load(path, lossy_cache_bias=64.0)
    with lm.trace() as recording:
        lm.generate(PROMPTS[0], max_new_tokens=3)
    file = tmp_path / "trace.npz"
    recording.trace().save(file)
    trace = ef_jax.RoutingTrace.load(file)
    assert trace.lossy == "cache_bias 64.0"
    assert "lossy: cache_bias 64.0" in repr(trace)
    assert "lossy: cache_bias 64.0" in lm.stats.table()
    words = ["--model", str(path), "--token-ids", "5,9", "--max-new-tokens", "2", "--context", "32", "--json"]
    generate([*words, "--expert-fraction", "0.25", "--chunk", "16", "--lossy-adaptive-experts", "0.01"])
    assert json.loads(capsys.readouterr().out)["stats"]["lossy"] == {"lossy_adaptive_experts": 0.01}
    dropping = load(path, lossy_adaptive_experts=0.01)
    with pytest.raises(ef_jax.UnsupportedError, match="load without lossy_adaptive_experts"), dropping.trace():
        pass


def test_programs_of_other_options_are_the_lossless_ones(path):
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
    device = jax.devices()[0]
    sizes = {"batch": 1, "context": 32, "chunk": 16, "pool_slots": 20, "kernels": choose_kernels(spec, device, None)}
    sharding = jax.sharding.SingleDeviceSharding(device)

    def step_programs(**options):
        return Programs(spec, **sizes, sharding=sharding, lossy=LossyOptions(**options)).layers(1, 32)

    plain, other = step_programs(), step_programs(quantize="int8")
    for one, two in itertools.zip_longest(plain, other):
        assert one is two
    of_share_one = step_programs(adaptive_experts=1.0)  # compiled anew, to the same program
    for one, two in itertools.zip_longest(plain, of_share_one):
        assert one is not two
        assert _instructions(one) == _instructions(two)


def _instructions(program):
    return [re.sub(r", metadata={[^}]*}", "", line) for line in program.as_text().splitlines() if " = " in line]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("adaptive_experts", 0.0),
        ("adaptive_experts", 1.5),
        ("cache_bias", -1.0),
        ("cache_bias", float("inf")),
        ("skip", float("nan")),
        ("low_precision_miss", 2.0),
        ("quantize", "int4:33"),
        ("quantize", "int2"),
    ],
)
def test_values_out_of_range_are_named(option, value):
    with pytest.raises(ef_jax.InputError, match=f"lossy_{option} .*{value}"):
        LossyOptions(**{option: value})


def test_one_expert_a_token_has_none_to_drop(tmp_path):
    write_synthetic(tmp_path / "model", Synthetic(hidden=32, width=16, experts=4, top_k=1, layers=1, vocab=64))
    with pytest.raises(ef_jax.UnsupportedError, match="one each"):
        load(tmp_path / "model", lossy_adaptive_experts=0.5)


def test_options_are_parsed_as_load_takes_them():
    parser = argparse.ArgumentParser()
    common.add_lossy_options(parser)
    given = parser.parse_args(["--lossy-cache-bias", "0.5", "--lossy-quantize", "int4:64"])
    assert LossyOptions(cache_bias=0.5, quantize="int4:64").as_dict() == {
        name: value for name, value in common.lossy_options(given).items() if value is not None
    }
