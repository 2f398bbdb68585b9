"""A stepper without a model: its tokens are a function of the request, and it checks that it is used as it asks."""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from ef_jax.errors import LinkError
from ef_jax.sampling_options import SamplingOptions
from ef_jax.serving.output import Output
from ef_jax.serving.request import Request

EOS = 0
VOCAB = 40
LAYERS, EXPERTS = 2, 8


def token_of(prompt: np.ndarray, seed: int, draw: int, step: int) -> int:
    """The token that a request gets at a step, whatever runs beside it; one in `VOCAB` is the end of the text."""
    return zlib.crc32(np.asarray([*prompt, seed, draw, step], np.int64).tobytes()) % VOCAB


def expected(request: Request, most: int | None = None) -> list[int]:
    """What a request that nothing disturbs gets; `most`: only the first tokens of it."""
    tokens: list[int] = []
    limit = request.output.limit if most is None else most
    while len(tokens) < limit and (EOS not in tokens or request.options.ignore_eos):
        tokens.append(token_of(request.prompt, request.options.seed, request.draw, len(tokens)))
    return tokens


def make_request(
    length: int, limit: int, *, draw: int = 0, deadline: float | None = None, ignore_eos: bool = False
) -> Request:
    """A request for up to `limit` tokens."""
    prompt = (np.arange(length) * 7 + limit).astype(np.int32)
    options = SamplingOptions(ignore_eos=ignore_eos)
    return Request(prompt, options, Output(None, options, eos=(EOS,), limit=limit), draw=draw, deadline=deadline)


class FakeStepper:
    """Rows as an engine has them, and what went on in them.

    faults: raised by the calls of the methods they name, one after the other; None lets a call pass.
    log: (method, rows) of every pass.
    """

    def __init__(self, rows: int, batch: int, *, chunk: int = 4, lanes: int = 3, paths: bool = False) -> None:
        self.rows, self.batch, self.repeats = rows, batch, True
        self.chunk, self.most_lanes, self.has_paths = chunk, lanes, paths
        self.faults: dict[str, list[BaseException | None]] = {}
        self.log: list[tuple[str, list[int]]] = []
        self.rests = 0
        self.lost = False
        self.prepared: dict[int, int] = {}
        self.held: dict[int, tuple[np.ndarray, SamplingOptions, int]] = {}
        self.filled: dict[int, int] = {}
        self.length: dict[int, int] = {}

    def fail(self, method: str, *errors: BaseException | None) -> None:
        """Have the next calls of `method` raise these."""
        self.faults.setdefault(method, []).extend(errors)

    def _may_fail(self, method: str) -> None:
        error = self.faults[method].pop(0) if self.faults.get(method) else None
        if error is not None:
            self.lost = self.lost or (method != "prepare" and not isinstance(error, LinkError))
            raise error

    def prepare(self, length: int, until: int) -> None:
        assert not self.lost
        self._may_fail("prepare")
        self.prepared[length] = max(until, self.prepared.get(length, 0))

    def cuts(self, length: int) -> list[tuple[int, int]]:
        full = [(start, self.chunk) for start in range(0, length - self.chunk + 1, self.chunk)]
        rest = length % self.chunk
        return full + ([(length - rest, 1 if rest == 1 else self.chunk)] if rest else [])

    def lanes(self, width: int) -> int:
        return self.most_lanes if width > 1 else 1

    def join(self, row: int, prompt: np.ndarray, options: SamplingOptions, draw: int) -> None:
        assert not self.lost
        assert 0 <= row < self.rows
        assert row not in self.held
        assert len(prompt) in self.prepared
        self._may_fail("join")
        self.held[row] = (prompt, options, draw)
        self.filled[row] = self.length[row] = 0

    def prompt_pass(self, width: int, parts: Sequence[tuple[int, int]]) -> dict[int, tuple[int, float]]:
        assert not self.lost
        rows = [row for row, _ in parts]
        assert 1 <= len(set(rows)) == len(rows) <= self.lanes(width)
        for row, start in parts:
            assert self.filled[row] == start
            assert (start, width) in self.cuts(len(self.held[row][0]))
        self._may_fail("prompt_pass")
        self.log.append(("prompt_pass", rows))
        firsts = {}
        for row in rows:
            self.filled[row] += width
            if self.filled[row] >= len(self.held[row][0]):
                self.length[row] = len(self.held[row][0])
                firsts[row] = (self._token(row), -0.5)
        return firsts

    def step(self, rows: Sequence[int], then: Sequence[int] = ()) -> list[tuple[int, float]]:
        assert not self.lost
        assert list(then) == sorted(set(then))
        assert not set(then) & set(rows)
        assert all(self.length[row] > 0 for row in then)
        assert list(rows) == sorted(set(rows))
        assert 1 <= len(rows) <= self.batch
        assert all(self.length[row] > 0 for row in rows)
        assert all(self.length[row] < self.prepared[len(self.held[row][0])] for row in rows)
        self._may_fail("step")
        self.log.append(("step", list(rows)))
        for row in rows:
            self.length[row] += 1
        return [(self._token(row), -0.5) for row in rows]

    def leave(self, row: int) -> None:
        assert not self.lost
        self._may_fail("leave")
        del self.held[row], self.filled[row], self.length[row]

    def rest(self) -> None:
        assert not self.held
        self.rests += 1

    def recover(self) -> None:
        self._may_fail("recover")
        self.lost = False
        for rows in (self.held, self.filled, self.length):
            rows.clear()

    def paths(self, rows: Sequence[int]) -> np.ndarray | None:
        assert all(self.length[row] > 0 for row in rows)
        if not self.has_paths:
            return None
        return np.stack([np.full((LAYERS, EXPERTS), row, np.uint8) for row in rows])

    def _token(self, row: int) -> int:
        prompt, options, draw = self.held[row]
        return token_of(prompt, options.seed, draw, self.length[row] - len(prompt))


def is_right(request: Request) -> bool:
    """Whether an ended request has the tokens it would get alone, or the first of them if something ended it."""
    got, reason = request.output.tokens, request.output.finish_reason
    if reason in ("eos", "length"):
        return got == expected(request)
    return got == expected(request, len(got))


def drain(engine, requests: Iterable[Request], *, most: int = 10_000) -> None:
    """Take turns until `requests` have ended."""
    for _ in range(most):
        if all(request.ended for request in requests):
            return
        engine.turn()
    raise AssertionError(f"not over after {most} turns")
