"""The Python face: prompts in every form, streaming, stopping, scoring, and what is refused."""

import itertools
import math

import numpy as np
import pytest

import ef_jax

PROMPT = "Psalms 23\n1 The LORD is my shepherd;"


@pytest.fixture(scope="module")
def lm():
    return ef_jax.load(expert_fraction=0.25, batch=2)


def test_prompts_are_text_or_ids_one_or_many(lm):
    ids = lm.encode(PROMPT)
    assert ids[0] == lm.spec.bos_id
    forms = [PROMPT, [PROMPT], ids, ids.tolist(), [ids], np.stack([ids])]
    results = [lm.generate(form, max_new_tokens=6) for form in forms]
    assert all(result == results[0] for result in results)
    several = lm.generate([PROMPT, ids, "ROMEO:"], max_new_tokens=6)
    assert len(several) == 3
    assert several[0] == several[1] == results[0][0]
    assert several[2].text != several[0].text


def test_a_stream_is_generates_text(lm):
    options = ef_jax.SamplingOptions(max_new_tokens=30, temperature=0.8, seed=11)
    pieces = list(lm.stream(PROMPT, options))
    assert len(pieces) > 10
    assert "".join(pieces) == lm.generate(PROMPT, options)[0].text
    heard: list[tuple[int, str]] = []
    results = lm.generate([PROMPT, "ROMEO:", "oak"], options, on_text=lambda i, piece: heard.append((i, piece)))
    for index, result in enumerate(results):
        assert "".join(piece for i, piece in heard if i == index) == result.text


def test_leaving_a_stream_early_leaves_the_model_usable(lm):
    stream = lm.stream(PROMPT, max_new_tokens=30)
    first = next(stream)
    stream.close()
    assert lm.generate(PROMPT, max_new_tokens=30)[0].text.startswith(first)


def test_streams_go_on_beside_other_calls(lm):
    options = {"max_new_tokens": 20, "ignore_eos": True}
    expected = [lm.generate(prompt, **options)[0].text for prompt in (PROMPT, "ROMEO:", "oak")]
    streams = [lm.stream(prompt, **options) for prompt in (PROMPT, "ROMEO:", "oak")]
    texts = [next(stream) + next(stream) for stream in streams]
    assert lm.generate("ROMEO:", **options)[0].text == expected[1]
    lm.logits([5] * 3)
    for index in (2, 0, 1):
        assert texts[index] + "".join(streams[index]) == expected[index]


def test_finish_reasons(lm):
    whole = lm.generate(PROMPT, max_new_tokens=24)[0]
    assert (whole.finish_reason, len(whole.tokens), len(whole.logprobs)) == ("length", 24, 24)
    word = whole.text.split()[3]
    stopped = lm.generate(PROMPT, max_new_tokens=24, stop=(word,))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(word)]
    assert len(stopped.tokens) < 24
    seeds = [11, *range(40)]  # the text of seed 11 ends on a CPU
    texts = (lm.generate("oak, oak tree (noun):", max_new_tokens=120, temperature=1.0, seed=seed)[0] for seed in seeds)
    ended = list(itertools.islice((result for result in texts if result.finish_reason == "eos"), 1))
    assert ended
    assert all(result.tokens[-1] == lm.spec.eos_ids[0] for result in ended)
    assert all("<|endoftext|>" not in result.text for result in ended)


def test_output_stops_at_the_end_of_the_context():
    small = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    ids = small.encode(PROMPT)
    result = small.generate(ids, max_new_tokens=1000, ignore_eos=True)[0]
    assert (result.finish_reason, len(ids) + len(result.tokens)) == ("length", 64)
    with pytest.raises(ef_jax.InputError, match="the prompt has 64 tokens and the context holds 64"):
        small.generate([5] * 64)
    assert small.logits([5] * 64).shape == (64, 4096)


def test_logprobs_and_scores_are_the_logits(lm):
    result = lm.generate(PROMPT, max_new_tokens=8)[0]
    ids = np.concatenate([lm.encode(PROMPT), result.tokens])
    logits = lm.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    chosen = logprobs[np.arange(len(ids) - 1), ids[1:]]
    assert np.abs(chosen[-8:] - result.logprobs).max() < 0.1  # prompt and decode round bfloat16 differently
    score = lm.score(ids)[0]
    assert score.tokens == len(ids) - 1
    assert score.logprob == pytest.approx(chosen.sum(), abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(-chosen.mean()))
    assert math.isnan(lm.score([[7]])[0].perplexity)


def test_the_model_knows_its_validation_text(lm, small_moe):
    text = (small_moe / "valid" / "bible.txt").read_text()[:1500]
    known, scrambled = lm.score([text, " ".join(sorted(text.split()))])
    assert known.perplexity < 40 < scrambled.perplexity


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "the prompt is empty"),
        ([], "there are no prompts"),
        ([[]], "the prompt is empty"),
        (["ok", ""], "the prompt is empty"),
        ([4096], "token id 4096 is outside the vocabulary of 4096"),
        ([-1], "token id -1 is outside the vocabulary of 4096"),
        (np.array([0.5]), "token ids must be whole numbers"),
        ([1] * 1024, "the prompt has 1024 tokens and the context holds 1024"),
        ("a\ud800", "the prompt is not valid text"),
    ],
)
def test_bad_prompts_are_refused(lm, prompts, message):
    with pytest.raises(ef_jax.InputError, match=message):
        lm.generate(prompts, max_new_tokens=2)


def test_unknown_options_and_missing_templates_are_named(lm):
    with pytest.raises(ef_jax.InputError, match="'max_tokens' is not a sampling option; the options are max_new"):
        lm.generate(PROMPT, max_tokens=3)
    with pytest.raises(ef_jax.InputError, match="no chat template"):
        lm.chat([{"role": "user", "content": "hello"}])


def test_without_a_tokenizer_ids_still_work(tmp_path, small_moe, lm):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(small_moe / name)
    bare = ef_jax.load(tmp_path, expert_fraction=0.25, batch=2)
    assert bare.tokenizer is None
    result = bare.generate(lm.encode(PROMPT), max_new_tokens=5)[0]
    assert result.text is None
    assert result.tokens == lm.generate(PROMPT, max_new_tokens=5)[0].tokens
    for call in (lambda: bare.generate(PROMPT), lambda: bare.stream([1, 2]), lambda: bare.generate([1], stop=("x",))):
        with pytest.raises(ef_jax.InputError, match="this checkpoint has no tokenizer"):
            call()
