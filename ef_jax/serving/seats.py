"""Who waits, and who holds which row of a stepper."""

from collections import deque
from collections.abc import Iterable

from ef_jax.serving.request import Request
from ef_jax.serving.stepper import Stepper


class Seats:
    """Requests from their arrival to their end: first in a queue, then on a row.

    Attributes:
      waiting: those without a row, in order of arrival.
      taken: those with one, by row, in the order in which they took it.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._arrived: deque[Request] = deque()  # which other threads may add to
        self.waiting: deque[Request] = deque()
        self.taken: dict[int, Request] = {}

    @property
    def empty(self) -> bool:
        """Whether there is nobody."""
        return not (self.taken or self.waiting or self._arrived)

    @property
    def free(self) -> list[int]:
        """Rows that nobody holds."""
        return [row for row in range(self._stepper.rows) if row not in self.taken]

    @property
    def filling(self) -> list[Request]:
        """Those whose prompts are not through."""
        return [request for request in self.taken.values() if request.cuts]

    @property
    def decoding(self) -> list[Request]:
        """Those whose prompts are."""
        return [request for request in self.taken.values() if not request.cuts]

    def add(self, requests: Iterable[Request]) -> None:
        """Requests arrive; any thread may call it, a finalizer too."""
        self._arrived.extend(requests)

    def receive(self) -> None:
        """Queue what has arrived."""
        while self._arrived:
            self.waiting.append(self._arrived.popleft())

    def prepare(self) -> None:
        """Compile for those that wait; one that cannot be compiled for ends alone."""
        for request in [request for request in self.waiting if not request.cuts]:
            length = len(request.prompt)
            try:
                self._stepper.prepare(length, request.until)
            except Exception as error:
                self.end(request, error)
            else:
                request.cuts = list(self._stepper.cuts(length))

    def seat(self, spare: int) -> None:
        """Give free rows to those that wait, but keep `spare` of them."""
        free = self.free if self.waiting else []
        for row in free[: max(0, len(free) - spare)]:
            if not self.waiting:
                return
            request = self.waiting.popleft()
            request.row = row
            self.taken[row] = request
            self._stepper.join(row, request.prompt, request.options, request.draw)

    def end(self, request: Request, error: Exception | None = None) -> None:
        """One is over, and what it held is free."""
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._stepper.leave(request.row)
            del self.taken[request.row]
            request.row = None
        request.end(error)

    def end_seated(self, error: Exception) -> int:
        """All that hold a row end by `error`, and their rows are left as they are; how many they were."""
        ended = list(self.taken.values())
        self.taken.clear()
        for request in ended:
            request.row = None
            request.end(error)
        return len(ended)

    def end_waiting(self, error: Exception) -> int:
        """All others end by `error`; how many they were."""
        self.receive()
        ended = list(self.waiting)
        self.waiting.clear()
        for request in ended:
            request.end(error)
        return len(ended)
