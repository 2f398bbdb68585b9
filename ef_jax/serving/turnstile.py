"""A lock that is handed on fairly."""

import contextlib
import threading
from collections.abc import Iterator


class Turnstile:
    """A lock for threads that take turns: whoever lets go of it cannot have it again before one who waits.

    Who takes it with `enter` waits its turn; who takes it with `slip_in` does so only if it is free at that moment,
    and so may be anywhere, in a finalizer too.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._inside = threading.Lock()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Hold it for a `with` block."""
        held = False
        try:
            # Whoever waits inside the gate is alone there, so that one who comes back finds the gate shut.
            with self._gate:
                held = self._inside.acquire()
            yield
        finally:
            if held:
                self._inside.release()

    @contextlib.contextmanager
    def slip_in(self) -> Iterator[bool]:
        """Hold it for a `with` block if it is free; gives whether it was."""
        free = False
        try:
            free = self._inside.acquire(blocking=False)
            yield free
        finally:
            if free:
                self._inside.release()
