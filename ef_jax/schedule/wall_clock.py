"""The time that links go by: a clock that can be waited on."""

import time
from typing import Protocol, runtime_checkable

_SPIN_SECONDS = 200e-6  # a sleep ends up to this much late on Linux, timer slack and scheduling together


@runtime_checkable
class Clock(Protocol):
    """Seconds that never go back."""

    @property
    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def wait_until(self, time: float) -> float:
        """Return when it is `time`, at once if that is past; returns the seconds waited."""
        ...


class WallClock:
    """Real time, in the seconds of `time.perf_counter`. Waiting sleeps, and spins through the last 0.2 ms."""

    @property
    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def wait_until(self, time: float) -> float:
        """Return when it is `time`, at once if that is past; returns the seconds waited."""
        began = now = self.now
        while now < time:
            if time - now > _SPIN_SECONDS:
                _sleep(time - now - _SPIN_SECONDS)
            now = self.now
        return now - began


_sleep = time.sleep
