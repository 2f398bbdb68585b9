"""Turns of the batch engine over a fake stepper: order, fairness, ends and errors."""

import gc
import itertools
import subprocess
import sys
import threading
import traceback
import weakref

import numpy as np
import pytest

from ef_jax.errors import LinkError
from ef_jax.serving.batch_engine import PATIENCE, BatchEngine
from ef_jax.serving.request import Request
from tests.serving.fake_stepper import FakeStepper, drain, is_right, make_request


class Broken(Exception):
    """An error that nobody foresaw."""


def many(count: int, *, length: int = 5, limit: int = 12, ignore_eos: bool = False) -> list[Request]:
    return [make_request(length, limit, draw=draw, ignore_eos=ignore_eos) for draw in range(count)]


def odd_and_even(paths: np.ndarray, size: int) -> list[list[int]]:
    order = [*range(1, len(paths), 2), *range(0, len(paths), 2)]
    return [order[first : first + size] for first in range(0, len(order), size)]


def left_nothing(engine: BatchEngine, stepper: FakeStepper) -> bool:
    return engine.idle and not stepper.held and not engine._cancelled


def test_serving_needs_no_jax():
    code = "import sys, ef_jax.serving.submission, ef_jax.serving.driver; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requests_get_the_tokens_they_would_get_alone_first_come_first_served():
    stepper = FakeStepper(3, 3)
    engine = BatchEngine(stepper)
    requests = [make_request(1 + 3 * n % 11, 1 + n % 7, draw=n) for n in range(20)]
    engine.submit(requests)
    ended: list[Request] = []
    started: list[Request] = []
    while not engine.idle:
        engine.turn()
        assert len(stepper.held) <= 3
        ended += [request for request in requests if request.ended and request not in ended]
        started += [request for request in requests if request.row is not None or request in ended]
    assert all(is_right(request) for request in requests)
    assert {request.output.finish_reason for request in requests} == {"eos", "length"}
    assert list(dict.fromkeys(started)) == requests
    assert ended != requests  # short ones do not wait for long ones
    assert left_nothing(engine, stepper)
    assert stepper.rests == 1


def test_a_prompt_holds_running_texts_up_for_one_chunk_at_most():
    stepper = FakeStepper(3, 3)
    engine = BatchEngine(stepper)
    running, long = make_request(2, 30, ignore_eos=True), make_request(23, 2, ignore_eos=True)
    engine.submit([running])
    engine.turn()
    engine.submit([long])
    drain(engine, [long])
    kinds = [kind for kind, _ in stepper.log]
    assert kinds.count("prompt_pass") == 1 + 6
    assert ["prompt_pass"] * 2 not in [kinds[at : at + 2] for at in range(len(kinds))]


def test_prompts_share_passes_of_their_width_as_lanes_allow():
    stepper = FakeStepper(5, 5)
    engine = BatchEngine(stepper)
    requests = [make_request(length, 1, draw=length) for length in (8, 4, 5, 7, 1)]
    engine.submit(requests)
    drain(engine, requests)
    assert [rows for kind, rows in stepper.log if kind == "prompt_pass"] == [[0, 1, 2], [0, 3], [2], [3], [4]]


@pytest.mark.parametrize("regroup", [None, odd_and_even])
def test_no_row_waits_longer_than_two_rounds_and_steps_are_full(regroup):
    stepper = FakeStepper(7, 3, paths=True)
    asked = []

    def listen(paths, size):
        asked.append((paths[:, 0, 0].tolist(), size))
        return regroup(paths, size)

    engine = BatchEngine(stepper, regroup=None if regroup is None else listen)
    requests = many(7, limit=100, ignore_eos=True)
    engine.submit(requests)
    drain(engine, requests)
    steps = [rows for kind, rows in stepper.log if kind == "step"]
    busy = steps[10:-40]
    assert all(len(rows) == 3 for rows in busy)
    for row in range(7):
        turns = [at for at, rows in enumerate(busy) if row in rows]
        assert max(b - a for a, b in itertools.pairwise(turns)) <= 5
    assert all(is_right(request) for request in requests)
    if regroup is not None:
        assert ([0, 1, 2, 3, 4, 5, 6], 3) in asked
        assert [1, 3, 5] in busy
        assert [0, 2, 4] in busy


def test_cancelled_requests_free_their_rows_wherever_they_are():
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    running, filling, waiting, other = make_request(1, 50, ignore_eos=True), make_request(20, 5), *many(2)
    engine.submit([running, filling, waiting])
    engine.turn()
    engine.turn()
    assert running.output.tokens
    assert filling.cuts
    engine.submit([other])
    engine.cancel([running, filling, waiting, other])
    assert all(request.ended and request.output.finish_reason == "cancelled" for request in (running, filling, waiting))
    assert not other.output.tokens
    assert left_nothing(engine, stepper)
    assert stepper.rests == 1
    engine.cancel([running])  # no effect on what has ended
    assert running.output.generation().tokens == running.output.tokens
    assert is_right(running)


def test_requests_end_when_their_time_is_up():
    now = 0.0
    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper, clock=lambda: now)
    running, waiting = make_request(3, 50, deadline=10.0, ignore_eos=True), make_request(3, 50, deadline=5.0)
    after = make_request(3, 4)
    engine.submit([running, waiting, after])
    for _ in range(3):
        engine.turn()
    now = 5.0
    engine.turn()
    assert (waiting.ended, waiting.output.finish_reason, waiting.output.tokens) == (True, "timeout", [])
    now = 11.0
    drain(engine, [running, after])
    assert running.output.finish_reason == "timeout"
    assert 3 <= len(running.output.tokens) < 50
    assert is_right(running)
    assert is_right(after)
    assert left_nothing(engine, stepper)


@pytest.mark.parametrize("method", ["prompt_pass", "step"])
def test_a_link_error_is_tried_once_more_and_then_ends_its_pass_alone(method):
    stepper = FakeStepper(3, 2, lanes=2)
    engine = BatchEngine(stepper)
    requests = many(4)
    engine.submit(requests)
    stepper.fail(method, LinkError("once"))
    engine.turn()
    assert not any(request.ended for request in requests)
    error = LinkError("expert 3 cannot be copied to the device: made to fail")
    engine.turn()
    stepper.fail(method, error, error)
    drain(engine, requests)
    failed = [request for request in requests if request.error is not None]
    assert 1 <= len(failed) <= 2
    assert all(request.error is error for request in failed)
    assert all(is_right(request) for request in requests)
    assert left_nothing(engine, stepper)


@pytest.mark.parametrize("method", ["prompt_pass", "step"])
def test_a_link_error_ends_all_where_passes_cannot_be_run_again(method):
    stepper = FakeStepper(3, 2, lanes=2)
    stepper.repeats = False
    engine = BatchEngine(stepper)
    requests = many(3)
    engine.submit(requests)
    engine.turn()
    running = [request for request in requests if request.row is not None and not request.ended]
    assert running
    error = LinkError("once")
    stepper.fail(method, error)
    drain(engine, requests)
    assert all(request.error is error for request in running)
    assert left_nothing(engine, stepper)


@pytest.mark.parametrize("method", ["join", "prompt_pass", "step", "leave"])
def test_any_other_error_ends_all_that_hold_a_row_and_the_rest_goes_on(method):
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    requests = many(5)
    engine.submit(requests)
    stepper.fail(method, None, Broken("out of memory"))
    drain(engine, requests)
    failed = [request for request in requests if request.error is not None]
    assert 1 <= len(failed) <= 2
    assert all(isinstance(request.error, Broken) and request.row is None for request in failed)
    assert all(is_right(request) for request in requests)
    assert left_nothing(engine, stepper)
    assert stepper.rests == 1


def test_a_request_that_cannot_be_compiled_for_ends_alone():
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    requests = many(3)
    engine.submit(requests)
    stepper.fail("prepare", None, Broken("too large"))
    drain(engine, requests)
    assert [type(request.error) for request in requests] == [type(None), Broken, type(None)]
    assert left_nothing(engine, stepper)


def test_what_cannot_recover_ends_everything_and_may_try_again():
    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper)
    requests = many(3)
    engine.submit(requests)
    engine.turn()
    stepper.fail("step", Broken("first"))
    stepper.fail("recover", Broken("worse"))
    engine.turn()
    assert [str(request.error) for request in requests] == ["first", "worse", "worse"]
    again = many(1)
    engine.submit(again)
    stepper.fail("recover", Broken("still"), Broken("still"))
    engine.turn()
    assert str(again[0].error) == "still"
    once_more = many(1)
    engine.submit(once_more)
    drain(engine, once_more)
    assert is_right(once_more[0])
    assert left_nothing(engine, stepper)


def test_an_error_with_nobody_to_tell_is_raised(monkeypatch):
    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper)
    request = make_request(1, 1)
    engine.submit([request])

    def rest():
        raise Broken("at rest")

    monkeypatch.setattr(stepper, "rest", rest)
    with pytest.raises(Broken, match="at rest"):
        engine.turn()
    assert request.ended
    assert request.error is None


def test_an_interrupt_frees_every_row_and_goes_on_to_the_caller():
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    mine, other, waiting = many(3)
    engine.submit([mine, other, waiting])
    engine.turn()
    stepper.fail("step", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.turn()
    assert "interrupted" in str(other.error)
    assert not stepper.held
    drain(engine, [waiting])
    assert is_right(waiting)
    assert waiting.error is None
    assert left_nothing(engine, stepper)


def test_text_that_cannot_be_made_ends_its_request_alone(monkeypatch):
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    bad, good = many(2)

    def push(token, logprob):
        raise Broken("no such piece")

    monkeypatch.setattr(bad.output, "push", push)
    engine.submit([bad, good])
    drain(engine, [bad, good])
    assert isinstance(bad.error, Broken)
    assert good.error is None
    assert is_right(good)
    assert left_nothing(engine, stepper)


def test_threads_take_turns_in_turn():
    stepper = FakeStepper(4, 4)
    engine = BatchEngine(stepper)
    sets = [[make_request(3, 40, draw=10 * who + n) for n in range(6)] for who in range(3)]

    def serve(requests: list[Request]) -> None:
        engine.submit(requests)
        drain(engine, requests)

    threads = [threading.Thread(target=serve, args=(requests,)) for requests in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(is_right(request) and request.error is None for requests in sets for request in requests)
    assert left_nothing(engine, stepper)


def test_a_request_cancelled_from_inside_a_pass_ends_after_it(monkeypatch):
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    requests = many(2)
    step = stepper.step

    def collected(rows, then=()):  # as when a generator is collected while its thread is in a pass
        engine.cancel([requests[0]])
        assert not requests[0].ended
        return step(rows, then)

    engine.submit(requests)
    engine.turn()
    monkeypatch.setattr(stepper, "step", collected)
    while not requests[0].ended:
        engine.turn()
    assert requests[0].output.finish_reason == "cancelled"
    monkeypatch.undo()
    drain(engine, requests)
    assert is_right(requests[1])
    assert left_nothing(engine, stepper)


def test_no_pass_is_run_for_who_needs_none_and_turns_can_be_held_off():
    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper)
    request = many(1)[0]
    engine.submit([request])
    engine.turn(unless=lambda: True)
    assert not stepper.log
    with engine.alone():
        engine.cancel([request])
        assert not request.ended
    assert request.ended


def test_a_visitor_gets_a_row_before_those_that_wait():
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    with engine.visit() as row:
        assert row in (0, 1)
    requests = many(6, limit=6)
    engine.submit(requests)
    engine.turn()
    with engine.visit() as row:
        assert row not in stepper.held
        assert not all(request.ended for request in requests)
        assert [request.row is None and not request.ended for request in requests].count(True) == 4
    drain(engine, requests)
    assert all(is_right(request) and request.error is None for request in requests)
    assert left_nothing(engine, stepper)
    assert stepper.rests == 2


@pytest.mark.parametrize("error", [LinkError, Broken, KeyboardInterrupt])
def test_a_visitor_that_fails_ends_the_others_unless_by_a_link_error(error):
    stepper = FakeStepper(2, 2)
    engine = BatchEngine(stepper)
    request, waiting = many(2, ignore_eos=True)
    engine.submit([request])
    engine.turn()
    engine.submit([waiting])
    with pytest.raises(error, match="made to fail"), engine.visit():
        raise error("made to fail")
    assert request.ended == (error is not LinkError)
    drain(engine, [request, waiting])
    assert is_right(waiting)
    assert waiting.error is None
    assert left_nothing(engine, stepper)


def test_a_visitor_waits_for_recovery():
    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper)
    requests = many(1)
    engine.submit(requests)
    stepper.fail("join", Broken("first"))
    stepper.fail("recover", Broken("worse"), Broken("still"))
    engine.turn()
    with pytest.raises(Broken, match="still"), engine.visit():
        pass
    with engine.visit() as row:
        assert (row, stepper.lost) == (0, False)
    assert left_nothing(engine, stepper)


def test_an_error_keeps_nothing_of_the_pass_it_ended(monkeypatch):
    class Array:
        pass

    stepper = FakeStepper(1, 1)
    engine = BatchEngine(stepper)
    kept: list[weakref.ref] = []

    def step(rows, then=()):
        array = Array()
        kept.append(weakref.ref(array))
        try:
            raise Broken("below")
        except Broken as error:
            raise LinkError("made to fail") from error

    monkeypatch.setattr(stepper, "step", step)
    request = make_request(1, 5, ignore_eos=True)
    engine.submit([request])
    drain(engine, [request])
    assert "in step" in "".join(traceback.format_exception(request.error))
    gc.collect()
    assert [array() for array in kept] == [None, None]


def test_a_step_hears_of_the_next_group_of_its_round(monkeypatch):
    stepper = FakeStepper(4, 2)
    engine = BatchEngine(stepper)
    heard, step = [], stepper.step

    def listening(rows, then=()):
        heard.append((list(rows), list(then)))
        return step(rows, then)

    monkeypatch.setattr(stepper, "step", listening)
    requests = many(4)
    engine.submit(requests)
    drain(engine, requests)
    announced = [(then, after) for (_, then), (after, _) in itertools.pairwise(heard) if then]
    assert announced
    assert all(set(then) <= set(after) or not set(then) & set(after) for then, after in announced)
    assert sum(set(then) <= set(after) for then, after in announced) > len(announced) // 2


def test_prompts_wait_for_company_while_steps_are_full(monkeypatch):
    stepper = FakeStepper(8, 2)
    monkeypatch.setattr(stepper, "lanes", lambda width: 2)
    engine = BatchEngine(stepper)
    first, late = many(2), many(6)[2:5]
    engine.submit(first)
    while any(request.cuts or request.row is None for request in first):
        engine.turn()
    passes = [entry for entry in stepper.log if entry[0] == "prompt_pass"]
    engine.submit(late[:1])
    for _ in range(PATIENCE):
        assert not any(request.ended for request in first)
        engine.turn()
    assert [entry for entry in stepper.log if entry[0] == "prompt_pass"] == passes  # alone it waits
    engine.turn()
    assert len([entry for entry in stepper.log if entry[0] == "prompt_pass"]) == len(passes) + 1  # but not for ever
    drain(engine, [*first, *late[:1]])
    assert all(is_right(request) for request in [*first, *late[:1]])
