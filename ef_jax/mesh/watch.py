"""Who of several processes is still there, and the end of this one when another is gone.

Every process but the first keeps a connection to process 0, over which both send a beat each second. One that closes
without a goodbye, or is silent for long, is a process that is gone; process 0 tells the others. Then each prints one
line on stderr and ends at once, whatever its main thread is doing: it may be in a collective that never ends.

A process that leaves says goodbye: that it is done, or that it failed. After a failure the others have a few seconds
to report the same one themselves, for what fails in one process often fails in all.
"""

import os
import socket
import threading
import time
from typing import Any

from ef_jax.mesh.tunnel import start
from ef_jax.mesh.wire import Wire, WireError

GONE = 70
"""Exit code of a process that ends because another is gone."""

SILENCE = 20.0
"""Seconds without a beat after which a process is gone."""

GRACE = 5.0
"""Seconds between another process's failure and the end of this one."""

_BEAT = 1.0
_NEWS = 3.0  # seconds in which a process that died is noticed, unless its host died too
_LONGEST_MESSAGE = 300


class Watch:
    """What a process knows of the others; the parts that process 0 and the others share.

    Args:
      process: this one's number.
      hosts: names of the hosts that processes run on.
    """

    def __init__(self, process: int, hosts: list[str]) -> None:
        self.process = process
        self.hosts = hosts
        self._wires: dict[int, Wire] = {}
        self._left: dict[int, str | None] = {}  # of those that said goodbye, why they failed
        self._stops = 0  # at which this process waited for the others
        self._there: dict[int, set[int]] = {}  # process 0: who is at which stop
        self._open = 0  # stops where all were
        self._changed = threading.Condition()
        self._ending = False

    def begin(self, wires: dict[int, Wire]) -> None:
        """Watch the processes at the other ends."""
        self._wires = wires
        for process in wires:
            start(self._listen, process)
        start(self._beat)

    def leave(self, failure: str | None) -> None:
        """Say goodbye: done, or why this process failed; only the first one counts."""
        with self._changed:
            if self.process in self._left:
                return
            if failure is not None:
                self._ending = True  # it has an error of its own to report, and needs no line about another's
                failure = " ".join(failure.split())[:_LONGEST_MESSAGE]
        self._note(self.process, failure)
        self._tell(left=self.process, failure=failure)

    def wait_for_all(self) -> None:
        """Wait until every process is here. Its calls are counted, so all processes have to make the same."""
        self._stops += 1
        self._arrive(self.process, self._stops)
        with self._changed:
            self._changed.wait_for(lambda: self._open >= self._stops)

    def has_left(self, process: int) -> bool:
        """Whether it said goodbye."""
        return process in self._left

    def all_done(self) -> bool:
        """Whether all said goodbye, and none failed."""
        return len(self._left) == len(self.hosts) and not self._failed()

    def wait_for_others(self, seconds: float) -> bool:
        """Wait until all are done; whether they are. Does not return if one is gone or has failed."""
        with self._changed:
            return self._changed.wait_for(self.all_done, seconds)

    def wait_for_news(self) -> None:
        """Wait until it would be known that another process is gone or failed; does not return if one is."""
        with self._changed:
            bad = self._changed.wait_for(lambda: self._failed() or self._ending, _NEWS)
        if bad:
            time.sleep(GRACE + 1)

    def name(self, process: int) -> str:
        """Which process, of how many, and where."""
        return f"process {process} of {len(self.hosts)} (host {self.hosts[process]})"

    def give_up(self, why: str) -> None:
        """End this process, which has said goodbye, and the others with it."""
        self._tell(gone=self.process, why=why)
        self._end(f"{self.name(self.process)} {why}")

    def _end(self, line: str) -> None:
        """Print a line and end this process, unless it is ending already."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify_all()
        # Past sys.stderr, whose lock the main thread may hold.
        os.write(2, f"ef-jax: {line}\n".encode(errors="backslashreplace"))
        self._hang_up()
        os._exit(GONE)

    def _gone(self, process: int, why: str) -> None:
        self._end(f"{self.name(process)} {why}; this process ends, since no step can go on without it")

    def _note(self, process: int, failure: str | None) -> None:
        with self._changed:
            self._left[process] = failure
            self._changed.notify_all()
        if process != self.process and failure is not None:
            timer = threading.Timer(GRACE, lambda: self._gone(process, f"failed ({failure})"))
            timer.daemon = True
            timer.start()

    def _failed(self) -> bool:
        return any(failure is not None for failure in self._left.values())

    def _listen(self, process: int) -> None:
        wire = self._wires[process]
        try:
            while (message := wire.receive()) is not None:
                self._hear(process, message)
            why = "is gone"
        except TimeoutError:
            why = f"has been silent for {wire.socket.gettimeout():.0f} s"
        except (WireError, LookupError, TypeError, ValueError):
            why = "says what no process of ours says"
        if not self.has_left(process):
            self._lost(process, why)

    def _hear(self, process: int, message: dict[str, Any]) -> None:
        if "left" in message:
            self._note(int(message["left"]), message["failure"])
        elif "gone" in message:
            self._gone(int(message["gone"]), str(message["why"]))
        elif "open" in message:
            self._pass(int(message["open"]))

    def _lost(self, process: int, why: str) -> None:
        self._gone(process, why)

    def _arrive(self, process: int, stop: int) -> None:
        self._tell(stop=stop)

    def _pass(self, stop: int) -> None:
        with self._changed:
            self._open = stop
            self._changed.notify_all()

    def _tell(self, **message: Any) -> None:
        for wire in self._wires.values():
            wire.send(**message)

    def _beat(self) -> None:
        while True:
            self._tell()
            time.sleep(_BEAT)

    def _hang_up(self) -> None:
        """Nothing is left to say."""


class FirstWatch(Watch):
    """Process 0's: passes on what it hears."""

    def _hear(self, process: int, message: dict[str, Any]) -> None:
        if "stop" in message:
            self._arrive(process, int(message["stop"]))
        elif message:
            self._tell(**message)
            super()._hear(process, message)

    def _arrive(self, process: int, stop: int) -> None:
        with self._changed:
            there = self._there.setdefault(stop, set())
            there.add(process)
            if len(there) < len(self.hosts):
                return
            del self._there[stop]
        self._tell(open=stop)
        self._pass(stop)

    def _lost(self, process: int, why: str) -> None:
        self._tell(gone=process, why=why)
        super()._lost(process, why)

    def _hang_up(self) -> None:
        """What was said has to arrive before connections break: beats that nobody reads any more would break them."""
        for wire in self._wires.values():
            try:
                wire.socket.shutdown(socket.SHUT_WR)
            except OSError:
                continue
        time.sleep(0.5)
