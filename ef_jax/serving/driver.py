"""The thread that takes turns for requests that nobody takes turns for."""

import atexit
import threading

from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.request import Request


class Driver:
    """Takes turns on a thread of its own until the requests it was given have ended; then the thread ends, too."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._driven: list[Request] = []
        self._thread: threading.Thread | None = None
        self._halted = False

    def drive(self, request: Request) -> None:
        """Submit a request and see to its end."""
        with self._lock:
            self._engine.submit([request])
            self._driven.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ef_jax-driver", daemon=True)
                self._thread.start()
                # A daemon thread that is inside compiled code when the interpreter goes would take it down.
                atexit.register(self._halt)

    def _run(self) -> None:
        try:
            while self._goes_on():
                self._engine.turn()
        except BaseException:
            with self._lock:
                given_up, self._driven, self._thread = self._driven, [], None
            self._engine.cancel(given_up)
            raise

    def _goes_on(self) -> bool:
        """Whether there is something to drive; if not, the thread counts as ended."""
        with self._lock:
            self._driven = [request for request in self._driven if not request.ended]
            if self._driven and not self._halted:
                return True
            self._thread = None
            if not self._halted:
                atexit.unregister(self._halt)
            return False

    def _halt(self) -> None:
        """End the thread after its turn."""
        with self._lock:
            self._halted = True
            thread = self._thread
        if thread is not None:
            thread.join()
