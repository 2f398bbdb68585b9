"""Messages between processes: lines of JSON over a TCP connection. Nothing is unpickled."""

import contextlib
import json
import socket
import threading
from typing import Any

_LONGEST = 1 << 20  # bytes of a line


class WireError(Exception):
    """What came is no message of ours."""


class Wire:
    """A connection: one thread receives, any may send.

    Args:
      connection: open; belongs to the wire from now on.
      patience: seconds that receiving waits for something and sending for room.
    """

    def __init__(self, connection: socket.socket, *, patience: float) -> None:
        connection.settimeout(patience)
        with contextlib.suppress(OSError):  # closed at the other end already: receiving will say so
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.rest = b""
        """What was received after the last message."""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> bool:
        """Send one message; whether the connection took it."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            try:
                self.socket.sendall(line)
            except OSError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other end closed.

        Raises:
          TimeoutError: nothing came within the patience.
          WireError: something else than a message came.
        """
        while b"\n" not in self.rest:
            if len(self.rest) > _LONGEST:
                raise WireError("a line without an end")
            try:
                part = self.socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not part:
                return None
            self.rest += part
        line, self.rest = self.rest.split(b"\n", 1)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError("not JSON") from error
        if not isinstance(message, dict):
            raise WireError("not an object")
        return message

    def close(self) -> None:
        """Close the connection, also under a thread that receives from it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
