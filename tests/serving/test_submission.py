"""Submissions: results, waiting, async iteration, cancelling, and the thread behind them."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ef_jax.errors import InputError, LinkError
from ef_jax.sampling_options import SamplingOptions
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.driver import Driver
from ef_jax.serving.output import Output
from ef_jax.serving.request import Request
from ef_jax.serving.submission import Submission
from ef_jax.text import Tokenizer
from tests.serving.fake_stepper import EOS, FakeStepper, expected, is_right, make_request

LONG = 100_000_000


@pytest.fixture(scope="module")
def tokenizer(small_moe: Path) -> Tokenizer:
    loaded = Tokenizer.load(small_moe, 4096)
    assert loaded is not None
    return loaded


class Served:
    """A fake engine that is driven in the background."""

    def __init__(self, rows: int = 2) -> None:
        self.stepper = FakeStepper(rows, rows)
        self.engine = BatchEngine(self.stepper)
        self.driver = Driver(self.engine)

    def submit(self, request: Request) -> Submission:
        self.driver.drive(request)
        return Submission(self.engine, request)

    def long(self) -> Submission:
        """One that ends only if somebody ends it."""
        return self.submit(make_request(3, LONG, ignore_eos=True))

    def is_over(self) -> bool:
        """Whether the thread has ended, soon, and all is free."""
        thread = self.driver._thread
        if thread is not None:
            thread.join(timeout=30)
        return self.driver._thread is None and self.engine.idle and not self.stepper.held


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)
    return holds()


def text_request(tokenizer: Tokenizer, limit: int = 20) -> Request:
    options = SamplingOptions(ignore_eos=True)
    output = Output(tokenizer, options, eos=(EOS,), limit=limit)
    return Request(make_request(3, 1).prompt, options, output)


def test_results_come_without_anybody_driving_and_the_thread_ends():
    served = Served()
    for _ in range(3):  # a thread ends and another begins
        requests = [make_request(4, 9, draw=n) for n in range(5)]
        submissions = [served.submit(request) for request in requests]
        for request, submission in zip(requests, submissions, strict=True):
            assert submission.result(timeout=30).tokens == expected(request)
            assert submission.done
        assert served.is_over()


def test_a_result_may_be_waited_for_again():
    served = Served()
    submission = served.long()
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 s"):
        submission.result(timeout=0.01)
    assert not submission.done
    submission.cancel()
    result = submission.result(timeout=30)
    assert result.finish_reason == "cancelled"
    assert result is not submission.result()
    assert result == submission.result()
    assert served.is_over()


def test_what_ended_it_is_raised():
    served = Served()
    error = LinkError("made to fail")
    served.stepper.fail("step", error, error)
    submission = served.submit(make_request(4, 9, ignore_eos=True))
    with pytest.raises(LinkError, match="made to fail"):
        submission.result(timeout=30)

    async def wait() -> None:
        await submission

    with pytest.raises(LinkError, match="made to fail"):
        asyncio.run(wait())
    assert served.is_over()


def test_submissions_are_awaited_together():
    served = Served()
    requests = [make_request(4, 9, draw=n) for n in range(5)]

    async def wait() -> list[list[int]]:
        submissions = [served.submit(request) for request in requests]
        results = await asyncio.gather(*submissions)
        assert (await submissions[0]) == results[0]
        return [result.tokens for result in results]

    assert asyncio.run(wait()) == [expected(request) for request in requests]
    assert served.is_over()


def test_an_end_between_looking_and_listening_is_heard(monkeypatch: pytest.MonkeyPatch):
    served = Served()
    submission = served.long()
    request = submission._request
    listen = request.listen

    def listen_late(listener: Callable[[], None]) -> None:
        submission.cancel()
        request.wait(30)
        listen(listener)

    monkeypatch.setattr(request, "listen", listen_late)

    async def wait() -> str:
        return (await asyncio.wait_for(submission, 30)).finish_reason

    assert asyncio.run(wait()) == "cancelled"


def test_text_comes_piece_by_piece_to_everybody_who_asks(tokenizer: Tokenizer):
    served = Served()

    async def read(submission: Submission) -> list[str]:
        return [piece async for piece in submission]

    async def wait() -> tuple[list[str], list[str], str | None]:
        submission = served.submit(text_request(tokenizer))
        first, second = await asyncio.gather(read(submission), read(submission))
        return first, second, (await submission).text

    first, second, text = asyncio.run(wait())
    assert first == second
    assert len(first) > 5
    assert "".join(first) == text
    assert served.is_over()

    async def read_ids() -> None:
        await read(served.submit(make_request(3, 3)))

    with pytest.raises(InputError, match="no tokenizer"):
        asyncio.run(read_ids())


@pytest.mark.parametrize("reads", [False, True])
def test_cancelling_who_waits_cancels_it(tokenizer: Tokenizer, reads: bool):
    served = Served()

    async def wait() -> None:
        submission = served.submit(text_request(tokenizer, limit=LONG)) if reads else served.long()

        async def read() -> None:
            async for _ in submission:
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read() if reads else submission, timeout=0.02)
        assert await asyncio.to_thread(submission._request.wait, 30)
        assert submission.result().finish_reason == "cancelled"

    asyncio.run(wait())
    assert served.is_over()


def test_leaving_the_loop_early_lets_it_go_on(tokenizer: Tokenizer):
    served = Served()

    async def wait() -> None:
        submission = served.submit(text_request(tokenizer))
        pieces = []
        async for piece in submission:
            pieces.append(piece)
            break
        assert (await submission).text.startswith(pieces[0])
        assert submission.result().finish_reason == "length"

    asyncio.run(wait())


def test_a_loop_that_is_gone_disturbs_nobody(tokenizer: Tokenizer):
    served = Served()
    submission = served.submit(text_request(tokenizer, limit=LONG))
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for _ in submission:
            pass

    task = loop.create_task(read())
    task._log_destroy_pending = False
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    other = served.submit(make_request(4, 9))
    other.result(timeout=30)
    submission.cancel()
    assert submission.result(timeout=30).finish_reason == "cancelled"
    assert served.is_over()
    assert not task.done()


def test_a_timeout_needs_nobody_to_wait_for_it():
    served = Served(rows=1)
    requests = [make_request(3, LONG, ignore_eos=True, deadline=time.monotonic() + after) for after in (0.05, 0.02)]
    submissions = [served.submit(request) for request in requests]
    assert [submission.result(timeout=30).finish_reason for submission in submissions] == ["timeout", "timeout"]
    assert is_right(requests[1])
    assert served.is_over()


def test_a_caller_gets_its_turns_beside_the_thread():
    served = Served()
    background = served.long()
    mine = make_request(4, 9)
    served.engine.submit([mine])
    while not mine.ended:
        served.engine.turn(unless=lambda: mine.ended)
    assert is_right(mine)
    assert not background.done
    background.cancel()
    assert served.is_over()


def test_a_thread_that_breaks_down_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    served = Served(rows=1)
    seen: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: seen.append(hook.exc_value))
    served.stepper.fail("step", SystemExit("no more"))
    first, second = served.submit(make_request(4, 9, ignore_eos=True)), served.submit(make_request(4, 9))
    with pytest.raises(RuntimeError, match="interrupted"):
        first.result(timeout=30)
    assert second.result(timeout=30).tokens == expected(second._request)[: len(second.result().tokens)]
    assert within(30, lambda: served.driver._thread is None)
    request = make_request(4, 9)
    assert served.submit(request).result(timeout=30).tokens == expected(request)


def test_the_interpreter_may_go_while_a_submission_runs():
    """A thread that is inside of compiled code then takes the process down, unless it is ended before."""
    code = """
import time
import jax, numpy as np
from tests.serving.test_submission import Served

served, x = Served(), np.ones((500, 500), np.float32)
step, run = served.stepper.step, jax.jit(lambda x: x @ x @ x)

def compute(rows, then=()):
    np.asarray(run(x))
    return step(rows, then)

served.stepper.step = compute
submissions = [served.long() for _ in range(3)]
while len(submissions[0]._request.output.tokens) < 3:
    time.sleep(0.001)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
