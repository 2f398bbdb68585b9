"""Continuous batching: requests join and leave the rows of a stepper between its passes."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from ef_jax.errors import LinkError
from ef_jax.generation import FinishReason
from ef_jax.serving.request import Request
from ef_jax.serving.rounds import Rounds
from ef_jax.serving.seats import Seats
from ef_jax.serving.stepper import Stepper
from ef_jax.serving.turnstile import Turnstile

_T = TypeVar("_T")

Regroup = Callable[[UInt8[np.ndarray, "n L E"], int], list[list[int]]]

PATIENCE = 8
"""Turns that prompts wait for company at most, while a step has enough to run without them."""


class BatchEngine:
    """Serves requests first come, first served, by turns that any thread may take.

    A turn is at most one prompt pass, then one decode step, so that a prompt holds running texts up for one chunk at
    most. A pass costs about the same however many prompts it takes, since most experts of every layer are needed. So
    where enough texts run to fill a step, prompts wait for company, for `PATIENCE` turns at most.

    Every request ends once: by its output (end of sequence, stop string, length), because it was cancelled or its time
    was up, or by an error. A `LinkError` ends the requests of the pass that meets it twice in a row; any other error,
    and a `LinkError` where passes cannot be repeated, all that hold a row, since it may have lost the caches.
    """

    def __init__(
        self,
        stepper: Stepper,
        *,
        regroup: Regroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`regroup`: cuts predicted paths `[n, L, E]` into groups of at most so many, by index, where more rows decode
        than a step takes; None: groups in order of arrival. `clock`: what deadlines refer to, in seconds."""
        self.clock = clock
        self._stepper = stepper
        self._turnstile = Turnstile()
        self._seats = Seats(stepper)
        # Needs no lock: a generator that is collected cancels its request wherever that happens.
        self._cancelled: deque[Request] = deque()
        # No method of this object's: a model that is deleted gives its memory back at once.
        self._rounds = Rounds(stepper.batch, functools.partial(_groups, stepper, regroup))
        self._lost = False
        self._rests = True
        self._held = 0  # turns that prompts have waited for company

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._seats.empty

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; they move on as turns are taken."""
        self._seats.add(requests)

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests that have not ended: now, or after the turn that another thread is in."""
        self._cancelled.extend(requests)
        self._settle()

    def turn(self, unless: Callable[[], bool] | None = None) -> None:
        """Take a turn: one prompt pass at most, then one decode step at most.

        Args:
          unless: asked when it is this thread's turn; no pass is run if it holds.
        """
        try:
            with self._turnstile.enter():
                if unless is None or not unless():
                    self._guard(self._turn)
        finally:
            self._settle()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold turns off for a `with` block."""
        try:
            with self._turnstile.enter():
                yield
        finally:
            self._settle()

    @contextlib.contextmanager
    def visit(self) -> Iterator[int]:
        """Hold turns off for a `with` block that uses the stepper itself, with a row that is free.

        Takes turns until one is; no request that waits gets it before. An error of the block is the caller's; unless
        it is a `LinkError`, it also ends all that hold a row.
        """
        try:
            with self._turnstile.enter():
                while self._lost or not (free := self._seats.free):
                    self._guard(lambda: self._turn(spare=1))
                self._rests = False
                try:
                    yield free[-1]
                except BaseException as error:
                    if not isinstance(error, LinkError):
                        self._fail(error if isinstance(error, Exception) else _interrupted())
                    raise
                finally:
                    self._guard(lambda: None)
        finally:
            self._settle()

    def _settle(self) -> None:
        """End cancelled requests, unless another turn is on: its thread comes here after it."""
        while self._cancelled:
            with self._turnstile.slip_in() as free:
                if not free:
                    return
                self._guard(self._end_cancelled)

    def _guard(self, work: Callable[[], None]) -> None:
        """Do `work`; an error in it ends all seated requests, and goes on to the caller if there are none."""
        try:
            if self._lost:
                self._recover()
            work()
            self._rest_if_idle()
        except Exception as error:
            if not self._fail(error):
                raise
        except BaseException:
            self._fail(_interrupted())
            raise

    def _fail(self, error: Exception) -> bool:
        """All seated requests end by `error`; whether any did."""
        self._lost = True
        ended = self._seats.end_seated(error)
        try:
            self._recover()
            self._rest_if_idle()
        except Exception as worse:
            ended += self._seats.end_waiting(worse)
        return ended > 0

    def _recover(self) -> None:
        self._stepper.recover()
        self._lost = False

    def _rest_if_idle(self) -> None:
        if self.idle and not self._rests:
            self._rests = True
            self._stepper.rest()

    def _turn(self, spare: int = 0) -> None:
        """A turn that leaves `spare` free rows free."""
        seats = self._seats
        self._end_cancelled()
        self._end_late()
        seats.prepare()
        self._rests = self._rests and not seats.waiting
        seats.seat(spare)
        self._prompt_pass()
        self._step()

    def _end_cancelled(self) -> None:
        self._seats.receive()
        while self._cancelled:
            request = self._cancelled.popleft()
            # A call may be interrupted before it has queued all of its requests.
            if request.row is not None or request in self._seats.waiting:
                self._close(request, "cancelled")

    def _end_late(self) -> None:
        now = self.clock()
        for request in [*self._seats.waiting, *self._seats.taken.values()]:
            if request.deadline is not None and now >= request.deadline:
                self._close(request, "timeout")

    def _prompt_pass(self) -> None:
        """The next chunk of the prompt that has waited longest, and of others that are as wide."""
        filling = self._seats.filling
        if not filling:
            return
        width = filling[0].cuts[0][1]
        busy = len(self._seats.decoding) >= self._stepper.batch
        if busy and len(filling) < self._stepper.lanes(width) and self._held < PATIENCE:
            self._held += 1
            return
        self._held = 0
        part = [request for request in filling if request.cuts[0][1] == width][: self._stepper.lanes(width)]
        parts = [(_row(request), request.cuts[0][0]) for request in part]
        firsts = self._run(part, lambda: self._stepper.prompt_pass(width, parts))
        if firsts is None:
            return
        for request, (row, _) in zip(part, parts, strict=True):
            del request.cuts[0]
            if not request.cuts:
                self._take(request, *firsts[row])

    def _step(self) -> None:
        """One token more of a group of those that decode."""
        decoding = self._seats.decoding
        if not decoding:
            return
        group = sorted(self._rounds.next(decoding), key=_row)
        rows = [_row(request) for request in group]
        then = sorted(_row(request) for request in self._rounds.upcoming if request.row is not None)
        tokens = self._run(group, lambda: self._stepper.step(rows, then))
        if tokens is not None:
            for request, (token, logprob) in zip(group, tokens, strict=True):
                self._take(request, token, logprob)

    def _run(self, part: Sequence[Request], run: Callable[[], _T]) -> _T | None:
        """A pass; None if it has met a `LinkError` twice, which has ended its requests then."""
        try:
            return run()
        except LinkError:
            if not self._stepper.repeats:
                raise
            # A second attempt asks for other copies.
        try:
            return run()
        except LinkError as error:
            for request in part:
                self._seats.end(request, error)
            return None

    def _take(self, request: Request, token: int, logprob: float) -> None:
        """A token has come; one that no text can be made of ends its request alone."""
        try:
            request.output.push(token, logprob)
        except Exception as error:
            self._seats.end(request, error)
            return
        if request.output.finish_reason is None:
            request.tell()
        else:
            self._seats.end(request)

    def _close(self, request: Request, reason: FinishReason) -> None:
        """End a request before its time."""
        request.output.close(reason)
        self._seats.end(request)


def _interrupted() -> RuntimeError:
    return RuntimeError("a call that ran together with this request was interrupted, and its caches lost")


def _groups(stepper: Stepper, regroup: Regroup | None, decoding: Sequence[Request], size: int) -> list[list[Request]]:
    """Requests in groups of at most `size`, by their predicted paths if there are any."""
    paths = None if regroup is None else stepper.paths([_row(request) for request in decoding])
    if regroup is None or paths is None:
        return [list(decoding[first : first + size]) for first in range(0, len(decoding), size)]
    return [[decoding[index] for index in group] for group in regroup(paths, size)]


def _row(request: Request) -> int:
    assert request.row is not None
    return request.row
