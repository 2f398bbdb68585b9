"""Rounds: who takes the next step."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ef_jax.serving.request import Request
from ef_jax.serving.rounds import Rounds
from tests.serving.fake_stepper import make_request


def in_order(requests: Sequence[Request], size: int) -> list[list[Request]]:
    return [list(requests[first : first + size]) for first in range(0, len(requests), size)]


def test_all_that_fit_step_together():
    requests = [make_request(1, 1) for _ in range(3)]
    rounds = Rounds(3, in_order)
    assert rounds.next(requests) == requests
    assert rounds.next(requests[1:]) == requests[1:]


def test_spare_places_go_to_newcomers_and_then_to_who_has_waited_longest():
    a, b, c, d, e, new = (make_request(1, 1) for _ in range(6))
    rounds = Rounds(3, lambda requests, size: [[b, d], [c], [a, e]] if new not in requests else in_order(requests, 3))
    assert rounds.next([a, b, c, d, e]) == [b, d]
    assert rounds.next([a, b, c, d, e]) == [c, b, d]
    assert rounds.next([a, b, c, d, e, new]) == [a, e, new]
    rounds = Rounds(2, lambda requests, size: [[a, b], [c, d], [e]])
    assert [rounds.next([a, b, c, d, e]) for _ in range(2)] == [[a, b], [c, d]]
    assert rounds.next([a, b, c, d, e]) == [e, a]
    rounds = Rounds(2, lambda requests, size: [[c, d], [a, b], [e]])
    assert [rounds.next([a, b, c, d, e]) for _ in range(2)] == [[c, d], [a, b]]
    assert rounds.next([a, b, c, d, e]) == [e, c]


def test_who_has_ended_is_left_out():
    a, b, c, d, e = (make_request(1, 1) for _ in range(5))
    rounds = Rounds(2, in_order)
    assert rounds.next([a, b, c, d, e]) == [a, b]
    assert rounds.next([a, b, e]) == [e, a]
    assert rounds.next([b]) == [b]


@given(size=st.integers(1, 4), changes=st.lists(st.integers(0, 8), min_size=1, max_size=60))
def test_fewer_steps_lie_between_two_of_a_request_than_two_rounds_have(size: int, changes: list[int]):
    running: list[Request] = []
    rounds = Rounds(size, in_order)
    waited: dict[Request, int] = {}
    for change in changes:
        if change < 5 and len(running) < 9:
            running.append(make_request(1, 1))
        elif running:
            del running[change % len(running)]
        if not running:
            continue
        group = rounds.next(running)
        assert len(group) == len(set(group)) == min(size, len(running))
        assert set(group) <= set(running)
        waited = {request: 0 if request in group else waited.get(request, 0) + 1 for request in running}
        assert max(waited.values()) < 2 * -(-9 // size)
