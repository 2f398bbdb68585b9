"""Reads by a few threads: those that somebody waits for go before those that somebody may want."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import jax

from ef_jax.memory.policies import Key


class Read:
    """One block on its way from the disk.

    Attributes:
      key: whose block it is.
      begun: a thread has taken it up.
      began, ended: when, in the seconds of `time.perf_counter`.
      done: it has come, or failed.
      block: what has come.
      error: why nothing has.
    """

    __slots__ = ("began", "begun", "block", "done", "ended", "error", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.begun = self.done = False
        self.began = self.ended = 0.0
        self.block: jax.Array | None = None
        self.error: Exception | None = None


class ReadQueue:
    """Threads that read blocks, as many at a time as there are threads.

    Args:
      read: reads a block, from any thread.
      threads: at most so many reads are under way.

    Attributes:
      begun: reads that have begun since construction.
    """

    def __init__(self, read: Callable[[Key], jax.Array], *, threads: int) -> None:
        self._shared = _Shared(read)
        for number in range(threads):
            # A daemon: a read that a dead disk never answers must not keep the process from ending.
            threading.Thread(target=_work, args=(self._shared,), name=f"ef_jax-read-{number}", daemon=True).start()
        weakref.finalize(self, self._shared.close)

    @property
    def begun(self) -> int:
        """See the class."""
        return self._shared.begun

    def demand(self, keys: Sequence[Key]) -> list[Read]:
        """Reads that are waited for: they begin before all others."""
        return self._add(self._shared.demand, keys)

    def ahead(self, keys: Sequence[Key]) -> list[Read]:
        """Reads that nobody waits for yet, the most urgent first."""
        return self._add(self._shared.ahead, keys)

    def urge(self, reads: Sequence[Read]) -> None:
        """Somebody waits for these reads, which were not urgent."""
        shared = self._shared
        with shared.changed:
            for read in reads:
                if not read.begun and read in shared.ahead:
                    shared.ahead.remove(read)
                    shared.demand.append(read)

    def withdraw(self) -> list[Read]:
        """Take back the reads that nobody waits for and that have not begun."""
        shared = self._shared
        with shared.changed:
            reads = list(shared.ahead)
            shared.ahead.clear()
        return reads

    def wait(self, read: Read, seconds: float) -> bool:
        """Wait until a read is done, so many seconds at most; whether it is."""
        if read.done:
            return True
        with self._shared.changed:
            return self._shared.changed.wait_for(lambda: read.done, seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds since construction in which any read was under way."""
        shared = self._shared
        with shared.changed:
            shared.tick()
            return shared.in_all

    def busy(self) -> tuple[int, float]:
        """Reads that have ended since this was last asked, and the seconds in which any was under way."""
        shared = self._shared
        with shared.changed:
            shared.tick()
            ended, seconds = shared.ended, shared.seconds
            shared.ended, shared.seconds = 0, 0.0
        return ended, seconds

    def _add(self, queue: deque[Read], keys: Sequence[Key]) -> list[Read]:
        reads = [Read(key) for key in keys]
        with self._shared.changed:
            queue.extend(reads)
            self._shared.changed.notify_all()
        return reads


class _Shared:
    """What the queue shares with its threads, which do not hold the queue itself."""

    def __init__(self, read: Callable[[Key], jax.Array]) -> None:
        self.read = read
        self.changed = threading.Condition()
        self.demand: deque[Read] = deque()
        self.ahead: deque[Read] = deque()
        self.begun = self.ended = self.running = 0
        self.seconds = self.in_all = self.since = 0.0
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def next(self) -> Read | None:
        """The read to begin now; waits for one; None: there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.demand or self.ahead)
            if self.closed:
                return None
            read = (self.demand or self.ahead).popleft()
            read.began = self.tick()
            read.begun = True
            self.begun += 1
            self.running += 1
            return read

    def end(self, read: Read) -> None:
        with self.changed:
            read.ended = self.tick()
            self.running -= 1
            self.ended += 1
            read.done = True
            self.changed.notify_all()

    def tick(self) -> float:
        """Count the time since the last tick if a read was under way; what time it is."""
        now = time.perf_counter()
        if self.running:
            self.seconds += now - self.since
            self.in_all += now - self.since
        self.since = now
        return now


def _work(shared: _Shared) -> None:
    while (read := shared.next()) is not None:
        try:
            read.block = shared.read(read.key)
        except Exception as error:
            read.error = error
        shared.end(read)
        del read  # or a thread that has nothing to do would keep its last block
