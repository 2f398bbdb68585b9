"""Whatever happens in whatever order: requests end once, with the tokens they would get alone, and nothing leaks."""

import random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ef_jax.errors import LinkError
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.request import Request
from tests.serving.fake_stepper import FakeStepper, drain, is_right, make_request

FAULTS = ("link", "memory", "defect")
METHODS = ("prepare", "join", "prompt_pass", "step", "leave")


def fault(kind: str) -> Exception:
    error = {"link": LinkError, "memory": MemoryError, "defect": RuntimeError}[kind]
    return error("made to fail")


class World:
    """A batch engine over a fake stepper, its clock, and all requests that it ever got."""

    def __init__(self, rows: int, batch: int, lanes: int, seed: int, grouped: bool) -> None:
        self.now = 0.0
        self.stepper = FakeStepper(rows, min(batch, rows), lanes=lanes, paths=grouped)
        self._random = random.Random(seed)
        regroup = self._regroup if grouped else None
        self.engine = BatchEngine(self.stepper, regroup=regroup, clock=lambda: self.now)
        self.requests: list[Request] = []
        self.ends: dict[Request, int] = {}
        self.endings: dict[Request, tuple] = {}

    def _regroup(self, paths: np.ndarray, size: int) -> list[list[int]]:
        order = self._random.sample(range(len(paths)), len(paths))
        return [order[first : first + size] for first in range(0, len(order), size)]

    def submit(self, length: int, limit: int, timeout: float | None) -> None:
        deadline = None if timeout is None else self.now + timeout
        request = make_request(length, limit, draw=len(self.requests), deadline=deadline)
        self.requests.append(request)
        self.ends[request] = 0

        def listen() -> None:
            self.ends[request] += request.ended

        request.listen(listen)
        self.engine.submit([request])

    def check(self) -> None:
        held = self.engine._seats.taken
        assert self.stepper.held.keys() == held.keys()
        assert all(request.row == row and not request.ended for row, request in held.items())
        for request in self.requests:
            assert self.ends[request] == request.ended
            if request not in self.endings:
                assert is_right(request)
            if request.ended:
                assert request.row is None
                assert str(request.error) == "made to fail" if request.error else request.output.finish_reason
                ending = (request.error, request.output.finish_reason, tuple(request.output.tokens))
                assert self.endings.setdefault(request, ending) == ending

    def finish(self) -> None:
        self.stepper.faults.clear()
        drain(self.engine, self.requests)
        self.check()
        assert self.engine.idle
        assert not self.stepper.held
        assert not self.engine._cancelled
        assert len(self.engine._rounds._stepped) <= self.stepper.rows


class Serving(RuleBasedStateMachine):
    @initialize(
        rows=st.integers(1, 5),
        batch=st.integers(1, 5),
        lanes=st.integers(1, 3),
        seed=st.integers(0, 99),
        grouped=st.booleans(),
    )
    def begin(self, rows: int, batch: int, lanes: int, seed: int, grouped: bool) -> None:
        self.world = World(rows, batch, lanes, seed, grouped)

    @rule(length=st.integers(1, 11), limit=st.integers(1, 9), timeout=st.none() | st.floats(0, 8))
    def submit(self, length: int, limit: int, timeout: float | None) -> None:
        self.world.submit(length, limit, timeout)

    @rule(turns=st.integers(1, 4))
    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.world.engine.turn()

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Also what has ended, also twice."""
        chosen = data.draw(st.lists(st.integers(0, len(self.world.requests) - 1), min_size=1, max_size=3))
        self.world.engine.cancel([self.world.requests[index] for index in chosen])
        assert all(self.world.requests[index].ended for index in chosen)

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(method=st.sampled_from(METHODS), kind=st.sampled_from(FAULTS), times=st.integers(1, 3))
    def break_down(self, method: str, kind: str, times: int) -> None:
        self.world.stepper.fail(method, *[fault(kind) for _ in range(times)])

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_nothing_leaks_in_ten_thousand_turns():
    world, chance = World(6, 4, 2, seed=0, grouped=True), random.Random(7)
    for turn in range(10_000):
        if chance.random() < 0.35:
            world.submit(chance.randint(1, 12), chance.randint(1, 20), chance.choice([None, None, None, 30.0]))
        if chance.random() < 0.05 and world.requests:
            world.engine.cancel(chance.sample(world.requests, 1))
        if chance.random() < 0.02:
            world.stepper.fail(chance.choice(METHODS), *[fault(chance.choice(FAULTS))] * chance.randint(1, 2))
        world.engine.turn()
        world.now += 1.0
        if turn % 500 == 499:
            world.check()
            assert len(world.engine._rounds._stepped) <= 6
            ended = [request for request in world.requests if request.ended]
            assert len(world.requests) - len(ended) < 400
    world.finish()
    assert len(world.requests) > 3000
    reasons = {request.output.finish_reason for request in world.requests}
    assert reasons == {"eos", "length", "cancelled", "timeout", None}
    assert sum(request.error is None for request in world.requests) > len(world.requests) / 2
