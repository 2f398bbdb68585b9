"""Processes that really run, on this machine."""

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from ef_jax.cli import main
from ef_jax.errors import InputError
from ef_jax.mesh.processes import COORDINATOR, PROCESS_ID, PROCESSES, _whereabouts, join_processes
from ef_jax.mesh.rendezvous import Party, meet, parse_address
from ef_jax.mesh.watch import GONE, GRACE, SILENCE
from ef_jax.mesh.wire import Wire, WireError
from tests.mesh.loopback import ROOT, Outcome, free_port, run_processes

_TOGETHER = str(ROOT / "tests" / "mesh" / "together.py")


def _at(outcome: Outcome, what: str) -> float:
    """When the program said something."""
    return float(next(line.split()[-1] for line in outcome.out.splitlines() if line.startswith(f"{what} ")))


# Whole programs.


def test_processes_compute_together_agree_and_end_together() -> None:
    outcomes = run_processes([_TOGETHER, "end", "1"], devices=2)
    for process, outcome in enumerate(outcomes):
        assert (outcome.code, outcome.err) == (0, "")
        assert "[0, 1] 4\n" in outcome.out
        disagree = "the processes disagree: context differs between processes 0 and 1"
        assert f"{disagree}; process {process} has {64 + process}\n" in outcome.out
    assert outcomes[0].ended >= _at(outcomes[1], "left at") - 0.1  # 0 was done a second before


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_when_a_process_dies_the_others_end_with_one_line(how: str, dies: int) -> None:
    outcomes = run_processes([_TOGETHER, how, str(dies)], processes=3 if how == "SIGKILL" else 2)
    why = "is gone" if how == "SIGKILL" else "has been silent for 3 s"
    host = outcomes[dies].out  # what it wrote before
    assert "at " in host
    for process, outcome in enumerate(outcomes):
        if process == dies:
            continue
        assert outcome.code == GONE, outcome
        (line,) = outcome.err.splitlines()
        assert line.startswith(f"ef-jax: process {dies} of {len(outcomes)} (host ")
        assert line.endswith(f") {why}; this process ends, since no step can go on without it")
        assert outcome.ended - _at(outcomes[dies], "at") < 15  # of 3 s silence


def test_a_silent_process_ends_the_others_within_half_a_minute() -> None:
    assert SILENCE + GRACE < 28


@pytest.mark.parametrize(
    ("how", "fails", "code", "why"), [("raise", 1, 1, "ValueError: not here"), ("SIGINT", 0, 130, "interrupted")]
)
def test_a_process_that_fails_alone_ends_the_others(how: str, fails: int, code: int, why: str) -> None:
    outcomes = run_processes([_TOGETHER, how, str(fails)])
    failed, other = outcomes[fails], outcomes[1 - fails]
    assert failed.code == code
    assert failed.err.count("Traceback") == 1  # its own
    assert "coordination" not in failed.err
    assert other.code == GONE
    (line,) = other.err.splitlines()
    assert f"process {fails} of 2 (host " in line
    assert f") failed ({why}); this process ends" in line


# Meeting.


def _party(port: int, process: int, **others: Any) -> Party:
    settings: dict[str, Any] = {
        "address": ("localhost", port),
        "processes": 3,
        "process": process,
        "host": f"host{process}",
        "versions": {"ef_jax": "1", "jax": "2"},
        "timeout": 2.0,
        "silence": 5.0,
    }
    return Party(**{**settings, **others})


class _Trying(threading.Thread):
    """Tries to meet, and keeps the error."""

    def __init__(self, party: Party) -> None:
        super().__init__()
        self.party = party
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            meet(self.party)
        except InputError as error:
            self.error = str(error)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def connect(port: int) -> Iterator[Callable[[], Wire]]:
    """Makes connections to the port as a stranger does."""
    with contextlib.ExitStack() as stack:

        def connect() -> Wire:
            wire = Wire(socket.create_connection(("localhost", port)), patience=5)
            stack.callback(wire.close)
            return wire

        yield connect


def test_a_process_that_does_not_come_is_named(port: int) -> None:
    first, second = _Trying(_party(port, 0)), _Trying(_party(port, 1))
    first.join()
    second.join()
    assert first.error.startswith(f"process 2 of 3 did not come to localhost:{port} within 2 s: start every process")
    assert second.error == f"process 0 at localhost:{port} went away before all 3 processes were there"


@pytest.mark.parametrize(
    ("party", "why"),
    [
        ({"processes": 4}, "process 1 on host1 says that there are 4 processes, process 0 says 3"),
        ({"versions": {"jax": "3"}}, "process 1 on host1 has jax 3, process 0 has ef_jax 1, jax 2"),
        ({"process": 2, "host": "twin"}, "there is a process 2 of 3 already, on host2"),
    ],
)
def test_a_process_that_disagrees_is_refused_and_the_others_wait_on(port: int, party: dict[str, Any], why: str) -> None:
    first, second = _Trying(_party(port, 0)), _Trying(_party(port, 2))
    while first.is_alive() and not first.error and not _answers(port):
        pass
    refused = _Trying(_party(port, **{"process": 1, **party}))
    for trying in (first, second, refused):
        trying.join()
    errors = [refused.error, second.error] if party.get("process") == 2 else [refused.error]
    assert any(error == f"process 0 at localhost:{port} refuses this process: {why}" for error in errors)
    assert first.error.startswith("process 1 of 3 did not come")
    assert f"({why})" in first.error


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port)).close()
    except OSError:
        return False
    return True


def test_strangers_are_sent_away(port: int, connect: Callable[[], Wire]) -> None:
    first = _Trying(_party(port, 0))
    while not _answers(port):
        pass
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04K\x01.\n",
        b"[1]\n",
        b'{"token": "guess"}\n',
        b"[" * 10**5 + b"\n",
    ):
        wire = connect()
        wire.socket.sendall(said)
        assert wire.receive() is None
    for hello in ({}, {"process": 1}, {"process": "1", "processes": 3, "host": "h", "versions": {}}):
        wire = connect()
        wire.send(**hello)
        assert wire.receive() == {"refused": "this is no hello"}
    first.join()
    assert "processes 1, 2 of 3 did not come" in first.error


def test_nobody_at_the_coordinator(port: int) -> None:
    with pytest.raises(InputError, match=rf"nothing answers at coordinator localhost:{port} within 0.3 s \(Connection"):
        meet(_party(port, 1, timeout=0.3))


def test_somebody_else_at_the_coordinator() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 cannot listen on port {port} .*in use"):
            meet(_party(port, 0))
        trying = _Trying(_party(port, 1))
        connection, _ = server.accept()
        connection.sendall(b"220 mail\r\n")
        trying.join()
        connection.close()
    assert trying.error == f"what answers at localhost:{port} is no process 0 of ef_jax: not JSON"


def test_messages_come_whole_and_long_ones_not_at_all() -> None:
    here, there = socket.socketpair()
    wire = Wire(here, patience=5)
    try:
        there.sendall(b'{"a"')
        there.sendall(b': 1}\n{"b": 2}\nrest')
        assert (wire.receive(), wire.receive(), wire.rest) == ({"a": 1}, {"b": 2}, b"rest")
        wire.rest = b"x" * (1 << 20)
        there.sendall(b"x")
        with pytest.raises(WireError, match="without an end"):
            wire.receive()
    finally:
        wire.close()
        there.close()


# What is refused before anything is waited for.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0), "coordinator 'host' is not HOST:PORT"),
        (("host:0", 2, 0), "'host:0' is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        (("::1:22", 2, 0), r"in brackets, \[::1\]:22"),
        (("host:1", 0, 0), "0 is not a number of processes"),
        (("host:1", 2, 2), "process id 2 is out of range: 2 processes have ids 0 to 1"),
        (("host:1", 2, -1), "process id -1 is out of range"),
        (("host:1", 2, None), f"no process id is given, .*set {PROCESS_ID}"),
        ((None, 2, 0), f"no coordinator is given, .*set {COORDINATOR}"),
        (("host:1", None, 0), f"no number of processes is given, .*set {PROCESSES}"),
    ],
)
def test_arguments_are_checked(arguments: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (COORDINATOR, PROCESSES, PROCESS_ID):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=message):
        join_processes(*arguments)


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ({"timeout": 0}, {"silence": 1}, {"timeout": float("nan")}):
        with pytest.raises(InputError, match=f"{next(iter(setting))} .* is not a number of seconds"):
            join_processes("host:1", 2, 0, **setting)
    monkeypatch.setenv(PROCESSES, "two")
    with pytest.raises(InputError, match=f"{PROCESSES}='two' is not a whole number"):
        join_processes("host:1", None, 0)


def test_processes_join_before_jax_is_used(port: int) -> None:
    before = jax.devices()
    with pytest.raises(InputError, match="JAX is in use already: call join_processes before"):
        join_processes(f"localhost:{port}", 2, 0)
    assert jax.devices() == before


def test_a_launcher_says_who_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (COORDINATOR, PROCESSES, PROCESS_ID):
        monkeypatch.delenv(variable, raising=False)
    slurm = {"JOB_ID": "77", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, process, local = _whereabouts(None, None, None, 5)
    assert parse_address(address)[0] == "node3"
    assert (count, process, local) == (2, 1, [0])
    assert _whereabouts("host:1", None, None, 5)[:3] == ("host:1", 2, 1)


def test_addresses() -> None:
    assert parse_address("10.0.0.1:1234") == ("10.0.0.1", 1234)
    assert parse_address("[::1]:22") == ("::1", 22)
    assert _party(22, 0, address=("::1", 22)).place == "[::1]:22"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2"], "--processes is for several processes: give --distributed too"),
        (["--process-id", "0"], "--process-id is for several processes: give --distributed too"),
        (["--distributed"], "--distributed shares a model among devices of several processes: give --mesh too"),
        (["--distributed", "--mesh", "expert=8", "--processes", "0"], "--processes"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert main(["generate", "hi", *words]) == 2
    assert message in err.getvalue()
