"""Several processes that run one model together: joining, agreeing, and leaving.

`join_processes` wraps `jax.distributed.initialize`. It adds what a run by hand needs: errors in one line, a watch that
ends every process within half a minute when one is gone (JAX's own takes minutes, and prints stack traces), and an end
at which nothing hangs.
"""

import atexit
import hashlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np

from ef_jax.errors import InputError
from ef_jax.mesh.rendezvous import Party, meet, parse_address
from ef_jax.mesh.watch import SILENCE, Watch

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
PROCESSES = "EF_JAX_PROCESSES"
PROCESS_ID = "EF_JAX_PROCESS_ID"

_LEAVING = 300.0  # seconds that a process that is done waits for the others
_SHUTDOWN = 60  # seconds for JAX's own goodbye, after all have said ours

_watch: Watch | None = None
_exit_code = 0
_why = "for a reason that it did not give"


def join_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    silence: float = SILENCE,
) -> None:
    """Make this process one of several that run a model together, before JAX is used for anything else.

    Each process calls it with its own number, or under Slurm, Open MPI or another launcher that JAX knows, with
    nothing. From then on `jax.devices()` are those of all processes. When another process dies, fails, or is silent
    for long, this one prints one line on stderr and ends with exit code 70, whatever it is doing; at the end of the
    program it waits until all others are done as well.

    Args:
      coordinator: "HOST:PORT" of process 0, a free port that all others can reach, and the only one that is opened
        for coordination. None: the variable JAX_COORDINATOR_ADDRESS, else as the launcher says.
      processes: how many. None: the variable EF_JAX_PROCESSES, else as the launcher says.
      process_id: this one's number, from 0. None: the variable EF_JAX_PROCESS_ID, else as the launcher says.
      timeout: seconds until all processes have to be there.
      silence: seconds without a sign of life after which a process is taken for gone, at least 3.

    Raises:
      InputError: an argument cannot be used, the coordinator cannot be reached, a process does not come, processes
        disagree about versions or numbers, or JAX is in use already.
    """
    global _watch
    if _watch is not None or jax.distributed.is_initialized():
        raise InputError("the processes are joined already: call join_processes once, and not jax.distributed as well")
    if not 0 < timeout < 1e6:
        raise InputError(f"timeout {timeout!r} is not a number of seconds above 0")
    if not 3 <= silence < 1e6:
        raise InputError(f"silence {silence!r} is not a number of seconds from 3")
    address, count, process, local = _whereabouts(coordinator, processes, process_id, timeout)
    party = Party(
        address=parse_address(address),
        processes=count,
        process=process,
        host=platform.node() or "unknown",
        versions={"ef_jax": _own_version(), "jax": jax.__version__},
        timeout=timeout,
        silence=silence,
    )
    _check_unused()
    _watch, service = meet(party)
    _end_well()
    # It would catch the signal that asks a process to end, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        service,
        count,
        process,
        local_device_ids=local,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout) + 1,
        shutdown_timeout_seconds=_SHUTDOWN,
        coordinator_bind_address=service if process == 0 else None,
    )


def same_everywhere(values: Mapping[str, str | bytes]) -> None:
    """Check that all processes have the same values; every process has to call it, with the same names in order.

    Raises:
      InputError: in all of them, if one has another value; it names what differs, and where.
    """
    if jax.process_count() == 1:
        return
    # Imported here: it is slow to import, and one process does not need it.
    from jax.experimental.multihost_utils import process_allgather

    if len(jax.devices()) != jax.process_count() * jax.local_device_count():
        raise InputError(
            f"{jax.process_count()} processes have {len(jax.devices())} devices in all, and process "
            f"{jax.process_index()} has {jax.local_device_count()}: every process needs the same number"
        )
    parts = [value.encode() if isinstance(value, str) else value for value in values.values()]
    digests = np.stack([np.frombuffer(hashlib.sha256(part).digest(), np.uint8) for part in parts])
    wait_for_all()
    everywhere = process_allgather(digests)  # [processes, names, 32]
    same = np.all(everywhere == everywhere[:1], axis=2)  # [processes, names]
    for column, name in enumerate(values):
        if not same[:, column].all():
            others = ", ".join(str(process) for process in np.flatnonzero(~same[:, column]))
            value = parts[column].decode(errors="backslashreplace")
            mine = f"; process {jax.process_index()} has {value:.80}" if value.isprintable() else ""
            raise InputError(f"the processes disagree: {name} differs between processes 0 and {others}{mine}")


def wait_for_all() -> None:
    """Wait until every process is here, for as long as it takes; returns at once where none were joined.

    What processes do each at their own pace, as compiling and reading, is followed by this before they compute
    together: a collective does not wait for minutes. All have to call it equally often.
    """
    if _watch is not None:
        _watch.wait_for_all()


def explain(error: BaseException) -> None:
    """Give the watch the time to say that another process is gone, if this may be why something failed here.

    A collective that fails because of it raises errors of many kinds, and may do so before the watch knows.

    It does not return if the watch finds that; else `error` is this process's own, and is what `leave` tells the
    others.
    """
    global _why
    if _watch is not None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            _watch.wait_for_news()
        _why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def leave(exit_code: int) -> None:
    """Say goodbye for a process that ends with this exit code; does nothing where none were joined.

    A process that failed ends here and now: nobody will come to JAX's own goodbye.
    """
    global _exit_code
    if _watch is not None and exit_code != 0:
        _exit_code = exit_code
        _watch.leave(_why)
        _say_goodbye()


def _check_unused() -> None:
    """JAX says whether it is in use only when this setting is about to change."""
    setting = "jax_num_cpu_devices"
    before = getattr(jax.config, setting)
    try:
        jax.config.update(setting, 1 if before != 1 else 2)
    except RuntimeError:
        raise InputError("JAX is in use already: call join_processes before anything that asks for devices") from None
    jax.config.update(setting, before)


def _whereabouts(
    coordinator: str | None, processes: int | None, process_id: int | None, timeout: float
) -> tuple[str, int, int, Sequence[int] | None]:
    """Address, number of processes, this one's, and its devices if it has only some of its host's."""
    coordinator = coordinator or os.environ.get(COORDINATOR)
    processes = _from_environment(PROCESSES) if processes is None else processes
    process_id = _from_environment(PROCESS_ID) if process_id is None else process_id
    local = None
    if None in (coordinator, processes, process_id):
        coordinator, processes, process_id, local = _ask_launcher(coordinator, processes, process_id, timeout)
    for value, name, variable in (
        (coordinator, "coordinator", COORDINATOR),
        (processes, "number of processes", PROCESSES),
        (process_id, "process id", PROCESS_ID),
    ):
        if value is None:
            raise InputError(f"no {name} is given, and no launcher that JAX knows says it: give it, or set {variable}")
    assert coordinator is not None
    assert processes is not None
    assert process_id is not None
    if not 0 < processes < 1 << 16:
        raise InputError(f"{processes} is not a number of processes: give at least 1")
    if not 0 <= process_id < processes:
        raise InputError(
            f"process id {process_id} is out of range: {processes} processes have ids 0 to {processes - 1}"
        )
    return coordinator, processes, process_id, local


def _from_environment(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{variable}={text!r:.60} is not a whole number") from None


def _ask_launcher(
    coordinator: str | None, processes: int | None, process_id: int | None, timeout: float
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """What `jax.distributed.initialize` would find out; it has no public name of its own."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:
        return coordinator, processes, process_id, None
    return ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, process_id, None, None, int(timeout))


def _own_version() -> str:
    try:
        return importlib.metadata.version("ef_jax")
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _end_well() -> None:
    """Say goodbye at the end of the program, and first of all after an uncaught error."""
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        global _exit_code
        explain(error)
        report(kind, error, trace)
        _exit_code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        assert _watch is not None
        _watch.leave(_why)

    sys.excepthook = hook
    # The last registered runs first: before JAX's own, which waits for all processes.
    atexit.register(_say_goodbye)


def _say_goodbye() -> None:
    assert _watch is not None
    if _exit_code == 0:
        _watch.leave(None)
        if _watch.wait_for_others(_LEAVING):
            return
        _watch.give_up(f"has waited for the others' end for {_LEAVING:.0f} s")
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    os._exit(_exit_code)
