"""The engine's counts, its budget, and that nothing compiles or grows while it runs."""

import itertools

import jax
import numpy as np
import pytest

import ef_jax

PROMPT = "Psalms 23\n1 The LORD is my shepherd;"


@pytest.fixture(scope="module")
def lm():
    return ef_jax.load(expert_fraction=0.25, batch=2, context=64, chunk=16)


def device_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")


def test_device_bytes_stay_within_the_plan_and_do_not_grow():
    before = device_bytes()
    lm = ef_jax.load(device_memory="16MB", context=288)
    assert lm.plan.total <= 16_000_000
    assert lm.plan.slots < lm.plan.experts
    engine = lm._engine
    programs = engine.programs
    highest, seen = 0, []

    calls = itertools.count()

    def watch(_sequence: int, _text: str) -> None:
        nonlocal highest
        number = next(calls)
        if number < 100 or number % 50 == 0:
            seen.append(device_bytes() - before)
            highest = max(highest, seen[-1])

    prompt = lm.encode(PROMPT)
    for _ in range(3):
        lm.generate(prompt, max_new_tokens=288 - len(prompt), ignore_eos=True, on_text=watch)
    assert lm.stats.decode.tokens + 3 > 3 * 264
    assert highest + programs.temp_bytes + engine.link.pool.temp_bytes <= lm.plan.budget
    assert lm.stats.peak_device_bytes >= seen[-1]
    assert seen[-1] == seen[len(seen) // 2]
    assert next(calls) > 600


def test_nothing_compiles_while_decoding(lm):
    lm.generate([PROMPT, "ROMEO:"], max_new_tokens=30)
    count = lm._engine.programs.count
    with jax.log_compiles(False):
        lm.generate([PROMPT, "ROMEO:"], max_new_tokens=40, temperature=0.7, top_k=9, top_p=0.8, seed=3)
    assert lm._engine.programs.count == count


def test_pool_and_caches_are_updated_in_place(lm):
    engine = lm._engine
    lm.generate(PROMPT, max_new_tokens=4)
    pool, k = engine.link.pool.array.unsafe_buffer_pointer(), engine._rows.caches[3][0].unsafe_buffer_pointer()
    moved = engine.link.bytes_moved
    lm.generate("import os\nimport sys\n\ndef main():", max_new_tokens=40)
    assert engine.link.bytes_moved > moved
    assert engine.link.pool.array.unsafe_buffer_pointer() == pool
    assert engine._rows.caches[3][0].unsafe_buffer_pointer() == k


def test_counts_add_up(lm):
    lm.stats.reset()
    result = lm.generate(PROMPT, max_new_tokens=20, ignore_eos=True)[0]
    decode = lm.stats.decode
    assert decode.steps == decode.tokens == 19 == len(result.tokens) - 1
    per_layer = [hits + misses for hits, misses in zip(decode.hits, decode.misses, strict=True)]
    assert per_layer == [19 * 4] * 8
    assert lm.stats.prefill.tokens == len(lm.encode(PROMPT))
    totals = lm.stats.as_dict()
    assert totals["hits"] == sum(totals["hits_by_layer"]) == sum(decode.hits) + sum(lm.stats.prefill.hits)
    assert totals["bytes_demand"] == totals["misses"] * lm.plan.block_bytes
    assert (totals["late_hits"], totals["bytes_prefetch"], totals["bytes_wasted"]) == (0, 0, 0)
    assert "decode" in lm.stats.table()


def test_a_layer_that_cannot_miss_is_not_read_back_and_still_counted():
    lm = ef_jax.load(expert_fraction=1.0, context=64, chunk=16)
    lm.stats.reset()
    lm.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
    assert lm._engine.residency.all_resident
    assert lm.stats.decode.hits == [4 * 4] * 8
    assert lm.stats.as_dict()["misses"] == lm.stats.as_dict()["bytes_demand"] == 0


def test_a_prompt_does_not_depend_on_its_company(lm):
    prompts = ["ROMEO:\nO, she doth teach", "oak, oak tree (noun):", PROMPT]
    together = lm.generate(prompts, max_new_tokens=16, temperature=0.9, seed=5)
    assert [r.tokens for r in together] == [
        r.tokens for r in lm.generate(prompts, max_new_tokens=16, temperature=0.9, seed=5)
    ]
    greedy = lm.generate(prompts, max_new_tokens=16)
    for prompt, result in zip(prompts, greedy, strict=True):
        alone = lm.generate(prompt, max_new_tokens=16)[0]
        assert alone.tokens == result.tokens
        assert alone.logprobs == result.logprobs


def test_a_second_prompt_evicts_nothing_and_finds_the_first_ones_experts(lm):
    lm.generate(PROMPT, max_new_tokens=8)
    engine = lm._engine
    held = set(engine.residency.key_of)
    lm.stats.reset()
    lm.logits(lm.encode("1 Samuel 4\n1 And the word of"))
    assert set(engine.residency.key_of) == held
    assert sum(lm.stats.prefill.hits) > 0


def test_logits_of_every_chunking_agree():
    ids = np.random.default_rng(1).integers(1, 4096, 90)
    wide, narrow = (ef_jax.load(expert_fraction=0.25, chunk=n, context=128, dtype="float32") for n in (128, 32))
    ours, theirs = wide.logits(ids), narrow.logits(ids)
    assert ours.shape == (len(ids), 4096)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
