"""Whether prefetching pays, by the clock: steps with it against steps without it."""

import statistics
from collections.abc import Callable
from typing import Any

_SETTLE = 48  # steps before the first trial, in which predictors learn
_ROUND = 10  # steps of one kind in a row, of which
_SKIPPED = 2  # the first are not timed, since the cache is as the other kind has left it
_ROUNDS = 2  # of each kind in a trial
_GAIN = 0.01  # by less than that, steps without are not called faster
_CLEAR = 0.05  # by more than that, steps with it are faster beyond doubt
_AGAIN, _MOST = 512, 8192  # steps until a trial is held again: at first, and after it has ended alike often
_DRIFT = 1.25  # how much slower a step must get for a clear result to be doubted


class Trial:
    """Turns prefetching off for as long as steps are faster without it.

    What a link is worth can be reckoned. What prefetching costs otherwise cannot be known beforehand: the host's work,
    copies that slow computing down where both share memory or cores, predictions on the device. So after the first
    steps there is a trial, two rounds of ten steps with and two of ten without; whoever has the lower median goes on.
    Without a clear result it is held again, at intervals that double as long as it ends alike. After a clear one
    for prefetching it is held again when steps have become slower, else never: it would only cost stalls.

    Steps of different batch sizes are not compared: when the size changes, a trial under way begins anew.

    Args:
      now: seconds.

    Attributes:
      on: this step may prefetch.
      because: why not.
      held: trials so far.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.on, self.because, self.held = True, "", 0
        self._began: float | None = None
        self._batch = 0
        self._wait, self._interval = _SETTLE, _AGAIN
        self._choice, self._clear = True, False
        self._turn: int | None = None  # step of the trial under way
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._recent: list[float] = []
        self._usual = 0.0
        self.medians: dict[str, float] = {}

    def begin_step(self, batch: int) -> None:
        """A step of `batch` sequences begins; decides whether it may prefetch."""
        now = self._now()
        if batch != self._batch:
            self._batch, self._began = batch, None
            self._usual = 0.0
            self._recent.clear()
            if self._turn is not None:
                self._begin_trial()
        if self._began is not None:
            self._took(now - self._began)
        self._began = now
        if self._turn is not None:
            self.on = (self._turn // _ROUND) % 2 == 0
        else:
            self.on = self._choice

    @property
    def wanted(self) -> bool:
        """Steps have to be able to prefetch: it pays, or that is to be found out again."""
        return self._choice or self._turn is not None or self._wait <= 0

    def rest(self) -> None:
        """A step begins that cannot prefetch, and is not timed."""
        self._wait -= 1
        self._began = None

    def pause(self) -> None:
        """What comes next does not belong to the step that has ended."""
        self._began = None

    def report(self) -> dict[str, Any]:
        """Plain JSON: trials held, median seconds of a step with and without prefetching in the last, and who won."""
        return {"held": self.held, "prefetching": self._choice, **self.medians}

    def _took(self, seconds: float) -> None:
        if self._turn is None:
            self._wait -= 1
            if self._clear:
                self._watch(seconds)
            if self._wait <= 0:
                self._begin_trial()
            return
        if self._turn % _ROUND >= _SKIPPED:
            self._seconds[self.on].append(seconds)
        self._turn += 1
        if self._turn == 2 * _ROUNDS * _ROUND:
            self._decide()

    def _begin_trial(self) -> None:
        self._turn = 0
        self._seconds = {True: [], False: []}

    def _decide(self) -> None:
        with_it, without = (statistics.median(self._seconds[kind]) for kind in (True, False))
        choice = without > (1 - _GAIN) * with_it
        self.held += 1
        self._interval = min(2 * self._interval, _MOST) if self.held > 1 and choice == self._choice else _AGAIN
        self._turn, self._wait, self._choice = None, self._interval, choice
        self._clear = choice and without > (1 + _CLEAR) * with_it
        self._recent.clear()
        self._usual = with_it
        self.medians = {"seconds_with": with_it, "seconds_without": without}
        self.because = (
            ""
            if choice
            else f"a step took {1e3 * with_it:.3g} ms with prefetching and {1e3 * without:.3g} ms without it"
        )

    def _watch(self, seconds: float) -> None:
        """After a clear result only a change of the steps' time is a reason for another trial."""
        self._wait = _AGAIN
        self._recent.append(seconds)
        if len(self._recent) == 2 * _ROUND:
            median = statistics.median(self._recent)
            self._recent.clear()
            if self._usual and median > _DRIFT * self._usual:
                self._wait = 0
            self._usual = median if not self._usual else self._usual
