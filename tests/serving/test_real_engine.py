"""The batch engine over the real one: whatever runs beside a request and whatever fails, its tokens are its own."""

import asyncio
import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from ef_jax.schedule.device_link import link_error
from ef_jax.serving.request import Request
from tests.serving.fake_stepper import drain

ROWS, BATCH, CONTEXT = 4, 2, 32
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1}
LENGTHS = ((3, 9), (17, 12), (26, 5), (1, 20), (24, 8), (16, 1), (9, 15), (5, 27))  # of a prompt, and of its output


@pytest.fixture(scope="module")
def lm() -> ef_jax.LanguageModel:
    return ef_jax.load(
        expert_fraction=0.25, batch=BATCH, sequences=ROWS, context=CONTEXT, chunk=16, emulate_link="20GB/s", prefetch=2,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and options, half of them greedy."""
    chance = random.Random(5)
    return [
        (
            [chance.randrange(1, 4096) for _ in range(length)],
            {"max_new_tokens": limit, "ignore_eos": True, "seed": n} | (SAMPLED if n % 2 else {}),
        )
        for n, (length, limit) in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def alone(lm: ef_jax.LanguageModel, requests: list[Any]) -> list[tuple[list[int], list[int]]]:
    """What each request gets when nothing runs beside it."""
    return [bits(lm.generate(prompt, **options)[0]) for prompt, options in requests]


@pytest.fixture(scope="module")
def start(lm: ef_jax.LanguageModel, alone: Any) -> tuple[int, int]:
    """Programs and bytes before all tests."""
    gc.collect()
    return programs(lm), live_bytes()


@pytest.fixture(autouse=True)
def nothing_leaks(lm: ef_jax.LanguageModel, start: tuple[int, int]) -> Iterator[None]:
    yield
    with lm._batch.alone():  # a turn that another thread is in is over
        assert lm._batch.idle
    assert lm._engine.residency.in_flight == []
    assert programs(lm) == start[0]
    gc.collect()
    assert abs(live_bytes() - start[1]) < 1 << 14  # ids and options of the last steps


def programs(lm: ef_jax.LanguageModel) -> int:
    return sum(each.count for each in (lm._engine.programs, lm._engine.lookout._blind) if each is not None)


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def bits(result: ef_jax.Generation) -> tuple[list[int], list[int]]:
    """Tokens, and log-probabilities bit by bit."""
    return result.tokens, np.float32(result.logprobs).view(np.uint32).tolist()


def test_submissions_get_what_they_get_alone(lm: ef_jax.LanguageModel, requests: list[Any], alone: list[Any]) -> None:
    submissions = [lm.submit(prompt, **options) for prompt, options in requests]
    assert [bits(submission.result(timeout=120)) for submission in submissions] == alone

    async def wait() -> list[ef_jax.Generation]:
        return await asyncio.gather(*(lm.submit(prompt, **options) for prompt, options in reversed(requests)))

    assert [bits(result) for result in asyncio.run(wait())] == alone[::-1]


def test_a_call_of_many_prompts_gives_each_what_it_gets_alone(
    lm: ef_jax.LanguageModel, requests: list[Any], alone: list[Any]
) -> None:
    prompts = [prompt for prompt, _ in requests]
    results = lm.generate(prompts, max_new_tokens=9, ignore_eos=True)
    for number in (0, 2, 4, 6):
        length = min(9, LENGTHS[number][1])
        assert bits(results[number])[0][:length] == alone[number][0][:length]
    same = [prompts[0]] * 6
    drawn = lm.generate(same, max_new_tokens=6, ignore_eos=True, seed=3, **SAMPLED)
    assert len({tuple(result.tokens) for result in drawn}) > 1
    fewer = lm.generate(same[:2], max_new_tokens=6, ignore_eos=True, seed=3, **SAMPLED)
    assert [bits(result) for result in fewer] == [bits(result) for result in drawn[:2]]


def test_streams_hold_rows_that_move_on_beside_everything_else(
    lm: ef_jax.LanguageModel, requests: list[Any], alone: list[Any]
) -> None:
    greedy = [requests[0], requests[2], requests[6], requests[4]]
    expected = [lm.generate(prompt, **options)[0].text for prompt, options in greedy]
    logits = lm.logits(requests[1][0])
    streams = [lm.stream(prompt, **options) for prompt, options in greedy]
    texts = [next(stream) for stream in streams]
    submission = lm.submit(requests[7][0], **requests[7][1])
    np.testing.assert_array_equal(lm.logits(requests[1][0]), logits)  # every row is held: one must end first
    streams.pop().close()
    texts.pop()
    assert bits(lm.generate(requests[3][0], **requests[3][1])[0]) == alone[3]
    for stream, text, whole in zip(streams, texts, expected, strict=False):
        assert text + "".join(stream) == whole
    assert bits(submission.result(timeout=120)) == alone[7]


def test_what_can_never_fit_is_refused_with_what_would(lm: ef_jax.LanguageModel) -> None:
    message = r"a prompt of 20 tokens and 128 new ones do not fit the context of 32: ask for max_new_tokens=12 at most"
    with pytest.raises(ef_jax.InputError, match=message):
        lm.submit([5] * 20)
    assert len(lm.submit([5] * 20, max_new_tokens=12, ignore_eos=True).result(timeout=120).tokens) == 12
    for timeout in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ef_jax.InputError, match="timeout must be seconds above 0"):
            lm.submit([5], timeout=timeout)
    with pytest.raises(ef_jax.InputError, match="the prompt is empty"):
        lm.submit([])


def test_time_that_is_up_and_cancelling_leave_what_had_come(
    lm: ef_jax.LanguageModel, requests: list[Any], alone: list[Any]
) -> None:
    prompt, options = requests[7]
    timed, cancelled = lm.submit(prompt, timeout=1e-3, **options), lm.submit(prompt, **options)
    result = timed.result(timeout=120)
    assert result.finish_reason == "timeout"
    assert result.tokens == alone[7][0][: len(result.tokens)]
    cancelled.cancel()
    result = cancelled.result(timeout=120)
    assert result.finish_reason == "cancelled"
    assert result.tokens == alone[7][0][: len(result.tokens)]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("scheduler.begin_step", RuntimeError),
        ("scheduler.ask", KeyboardInterrupt),
        ("scheduler.complete", RuntimeError),
        ("scheduler.serve_prompt", KeyboardInterrupt),
        ("_choose", RuntimeError),
        ("join", KeyboardInterrupt),
    ],
)
def test_an_error_anywhere_in_a_pass_harms_no_later_request(
    lm: ef_jax.LanguageModel,
    requests: list[Any],
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: type[BaseException],
) -> None:
    *path, name = place.split(".")
    owner = lm._engine.scheduler if path else lm._engine
    real, calls = getattr(owner, name), 0

    def fail(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("RESOURCE_EXHAUSTED: made to fail")
        return real(*arguments, **options)

    stream = lm.stream(requests[6][0], **requests[6][1])
    next(stream)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error, match="made to fail"):
        lm.generate([prompt for prompt, _ in requests[:5]], max_new_tokens=9, ignore_eos=True)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"made to fail|was interrupted"):
        list(stream)
    assert lm._batch.idle
    assert [bits(lm.generate(prompt, **options)[0]) for prompt, options in requests[:2]] == alone[:2]


def test_in_any_order_with_failing_copies_every_request_ends_once_with_its_own_tokens(
    lm: ef_jax.LanguageModel, requests: list[Any], alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, start_copies = lm._engine.link, lm._engine.link.start
    chance = random.Random(11)
    failing = 0  # of the next demand copies; a pass that meets one is tried once more

    def unreliable(layer: int, experts: Sequence[int]) -> Any:
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise link_error([(layer, expert) for expert in experts], "made to fail")
        return start_copies(layer, experts)

    monkeypatch.setattr(link, "start", unreliable)
    numbers: dict[Request, int] = {}
    ends: dict[Request, int] = {}
    for _ in range(90):
        if chance.random() < 0.3:
            number = chance.randrange(len(requests))
            prompt, options = requests[number]
            request = lm._request(lm.encode(prompt), ef_jax.SamplingOptions(**options))
            numbers[request], ends[request] = number, 0
            request.listen(lambda request=request: ends.update({request: ends[request] + request.ended}))
            lm._batch.submit([request])
        if chance.random() < 0.05 and numbers:
            lm._batch.cancel(chance.sample(list(numbers), 1))
        failing = chance.choice((0, 0, 0, 0, 0, 0, 0, 1, 1, 2))
        lm._batch.turn()
    failing = 0
    drain(lm._batch, numbers)
    whole = 0
    for request, number in numbers.items():
        tokens, logprobs = alone[number]
        got = len(request.output.tokens)
        assert ends[request] == 1
        assert request.output.tokens == tokens[:got]
        assert np.float32(request.output._logprobs).view(np.uint32).tolist() == logprobs[:got]
        if request.error is not None:
            assert isinstance(request.error, ef_jax.LinkError)
        elif request.output.finish_reason != "cancelled":
            assert got == len(tokens)
            whole += 1
    assert 10 < whole < len(numbers)
    assert any(request.error for request in numbers)
