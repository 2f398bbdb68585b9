"""JAX's coordination traffic over connections of ours.

JAX's client aborts its process, with a stack trace, as soon as its connection to the coordination service closes. So
clients connect to a port of their own process, from which bytes go on to process 0; if that is gone, the client's
connection stays open, and the watch has the time to say what happened in one line. It also means that a run has one
port only.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_LOOPBACK = "127.0.0.1"


def open_tunnel(connect: Callable[[], socket.socket], *, may_close: Callable[[], bool]) -> str:
    """Carry connections from a new port of the loopback interface onward.

    Args:
      connect: makes the connection onward.
      may_close: whether a connection may close because the one onward has.

    Returns:
      The address of the port.
    """
    server = socket.create_server((_LOOPBACK, 0))

    def carry(client: socket.socket) -> None:
        try:
            onward = connect()
        except OSError:
            return  # the client's connection stays open
        start(_pump, client, onward)
        _pump(onward, client, may_close=may_close)

    def accept() -> None:
        held = []
        while True:
            client, _ = server.accept()
            held.append(client)  # one that nobody refers to would be closed
            start(carry, client)

    start(accept)
    return f"{_LOOPBACK}:{server.getsockname()[1]}"


def end_tunnel(connection: socket.socket, first: bytes, address: str, *, seconds: float) -> None:
    """Carry a connection to a service that may be about to start.

    Args:
      connection: from `open_tunnel`'s `connect`.
      first: what it has sent already.
      address: the service's.
      seconds: how long the service may take to start.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            service = socket.create_connection((host, int(port)))
            break
        except OSError:
            if time.monotonic() > deadline:
                connection.close()
                return
            time.sleep(0.05)
    connection.settimeout(None)
    with contextlib.suppress(OSError):
        service.sendall(first)
    start(_pump, service, connection)
    _pump(connection, service)


def free_address() -> str:
    """An address of the loopback interface that nobody listens on."""
    with socket.create_server((_LOOPBACK, 0)) as server:
        return f"{_LOOPBACK}:{server.getsockname()[1]}"


def start(run: Callable[..., None], *arguments: Any) -> None:
    """Run a function on a thread that does not keep the process alive."""
    threading.Thread(target=run, args=arguments, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, *, may_close: Callable[[], bool] = lambda: True) -> None:
    """Move bytes until the source ends, and end the sink if it may."""
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            sink.sendall(part)
    if may_close():
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
