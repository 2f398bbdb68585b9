"""How several processes find one another: process 0 listens at one address, and the others come there.

Strangers on the port are ignored: who does not say hello in our way, as a process that is missing, is sent away, and
once all are there only they can connect, by a token.
"""

import dataclasses
import hmac
import secrets
import socket
import threading
import time
from typing import Any

from ef_jax.errors import InputError
from ef_jax.mesh.tunnel import end_tunnel, free_address, open_tunnel, start
from ef_jax.mesh.watch import FirstWatch, Watch
from ef_jax.mesh.wire import Wire, WireError

_HELLO = 10.0  # seconds for the first message
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Party:
    """Who meets where.

    Attributes:
      address: host and port of process 0.
      processes: how many.
      process: this one's number, from 0.
      host: the name of this one's host.
      versions: what has to be the same in all, by name.
      timeout: seconds until all have to be there.
      silence: seconds without a beat after which a process is gone.
    """

    address: tuple[str, int]
    processes: int
    process: int
    host: str
    versions: dict[str, str]
    timeout: float
    silence: float

    @property
    def place(self) -> str:
        """The address as text."""
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def meet(party: Party) -> tuple[Watch, str]:
    """Wait until all processes are there, and watch them from then on.

    Returns:
      The watch; the address at which JAX's coordination service is for this process, which process 0 has to start.

    Raises:
      InputError: the address cannot be used, a process is missing, or two disagree.
    """
    return _First(party).meet() if party.process == 0 else _come(party)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", where a host may be an IPv6 address in brackets.

    Raises:
      InputError: something else.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (separator and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16 and host.strip("[]")):
        raise InputError(f"coordinator {text!r:.200} is not HOST:PORT, for example 10.0.0.1:1234")
    if ":" in host and not bracketed:
        raise InputError(f"coordinator {text!r:.200}: write an IPv6 address in brackets, [{host}]:{port}")
    return host[1:-1] if bracketed else host, int(port)


class _First:
    """Process 0's side."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.service = free_address()
        self.token = secrets.token_hex(16)
        self.wires: dict[int, Wire] = {}
        self.hosts = {0: party.host}
        self.refused = ""
        self.complete = False
        self.changed = threading.Condition()

    def meet(self) -> tuple[Watch, str]:
        party = self.party
        server = _listen(party)
        start(self._accept, server)
        deadline = time.monotonic() + party.timeout
        with self.changed:
            while len(self.hosts) < party.processes:
                self.changed.wait(1.0)
                for process, wire in list(self.wires.items()):
                    if not wire.send():  # it is gone, and may come again
                        del self.wires[process], self.hosts[process]
                if time.monotonic() > deadline:
                    server.close()
                    for wire in self.wires.values():
                        wire.close()
                    raise InputError(self._missing())
            self.complete = True
        hosts = [self.hosts[process] for process in range(party.processes)]
        watch = FirstWatch(0, hosts)
        for process, wire in self.wires.items():
            wire.send(hosts=hosts, process=process, token=self.token)
        watch.begin(self.wires)
        return watch, self.service

    def _missing(self) -> str:
        party = self.party
        missing = [str(process) for process in range(party.processes) if process not in self.hosts]
        which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
        return (
            f"{which} of {party.processes} did not come to {party.place} within {party.timeout:g} s{self.refused}: "
            "start every process with the same coordinator, and a timeout that lets all of them start"
        )

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            start(self._answer, Wire(connection, patience=_HELLO))

    def _answer(self, wire: Wire) -> None:
        try:
            message = wire.receive()
        except (TimeoutError, WireError):
            message = None
        if message is None:
            wire.close()
        elif "token" in message:
            if self.complete and hmac.compare_digest(str(message["token"]).encode(), self.token.encode()):
                end_tunnel(wire.socket, wire.rest, self.service, seconds=self.party.timeout)
            else:
                wire.close()
        else:
            wire.socket.settimeout(self.party.silence)
            refusal = self._admit(message, wire)
            if refusal is not None:
                wire.send(refused=refusal)
                wire.close()

    def _admit(self, hello: dict[str, Any], wire: Wire) -> str | None:
        """Take a process in, or say why not."""
        party = self.party
        process, processes, host = hello.get("process"), hello.get("processes"), hello.get("host")
        versions = hello.get("versions")
        if not (isinstance(process, int) and isinstance(host, str) and isinstance(versions, dict)):
            return "this is no hello"
        with self.changed:
            if processes != party.processes:
                refusal = f"process {process} on {host} says that there are {processes} processes, process 0 says "
                refusal += f"{party.processes}"
            elif versions != party.versions:
                refusal = f"process {process} on {host} has {_words(versions)}, process 0 has {_words(party.versions)}"
            elif not 0 < process < party.processes or process in self.hosts:
                refusal = f"there is a process {process} of {processes} already, on {self.hosts.get(process, host)}"
            else:
                self.wires[process], self.hosts[process] = wire, host
                self.changed.notify_all()
                return None
            self.refused = f" ({refusal})"[:300]
            return refusal


def _come(party: Party) -> tuple[Watch, str]:
    """The other processes' side."""
    wire = Wire(_connect(party), patience=party.silence)
    wire.send(process=party.process, processes=party.processes, host=party.host, versions=party.versions)
    try:
        message = _wait_for_all(party, wire)
    except InputError:
        wire.close()
        raise
    watch = Watch(party.process, [str(host) for host in message["hosts"]])
    token = str(message["token"])

    def connect() -> socket.socket:
        connection = socket.create_connection(party.address, timeout=party.silence)
        connection.settimeout(None)
        connection.sendall(b'{"token": "' + token.encode() + b'"}\n')
        return connection

    service = open_tunnel(connect, may_close=watch.all_done)
    watch.begin({0: wire})
    return watch, service


def _wait_for_all(party: Party, wire: Wire) -> dict[str, Any]:
    """What process 0 says when all are there."""
    while True:
        try:
            message = wire.receive()
        except (TimeoutError, WireError) as error:
            raise InputError(f"what answers at {party.place} is no process 0 of ef_jax: {error}") from None
        if message is None:
            raise InputError(f"process 0 at {party.place} went away before all {party.processes} processes were there")
        if "refused" in message:
            raise InputError(f"process 0 at {party.place} refuses this process: {message['refused']}"[:500])
        if "token" in message:
            return message


def _listen(party: Party) -> socket.socket:
    """Listen on the loopback interface if that is the coordinator's, else on all interfaces."""
    host, port = party.address
    try:
        if host in _LOOPBACK:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} of coordinator {party.place} ({error.strerror}): choose another"
        ) from None


def _connect(party: Party) -> socket.socket:
    """A connection to process 0, which may be about to start."""
    deadline = time.monotonic() + party.timeout
    while True:
        try:
            return socket.create_connection(party.address, timeout=max(0.1, min(5.0, deadline - time.monotonic())))
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise InputError(
                    f"nothing answers at coordinator {party.place} within {party.timeout:g} s "
                    f"({error.strerror or error}): process 0 has to run there, and its port has to be reachable"
                ) from None
            time.sleep(0.2)


def _words(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
