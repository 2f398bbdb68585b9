"""Several processes of this machine that run one program together over the loopback interface."""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one process came to.

    Attributes:
      code: exit code, or minus the signal that ended it.
      out: what it wrote on stdout.
      err: what it wrote on stderr.
      ended: `time.monotonic()` when it was last seen running.
      peak_rss: the most bytes of memory that it had, as seen every 20 ms.
    """

    code: int
    out: str
    err: str
    ended: float
    peak_rss: int


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_processes(
    words: Sequence[str],
    *,
    processes: int = 2,
    devices: int = 1,
    seconds: float = 60.0,
    settings: dict[str, str] | None = None,
    different: dict[int, Sequence[str]] | None = None,
    cached: bool = False,
) -> list[Outcome]:
    """Run Python with the same words in several processes, each told by variables who it is.

    Args:
      words: after `python`.
      processes: how many.
      devices: CPU devices of each.
      seconds: until what still runs is killed, stopped processes included.
      settings: further environment variables.
      different: other words for some of the processes.
      cached: whether compiled programs are kept as in the rest of the suite.
    """
    environment = {name: value for name, value in os.environ.items() if cached or not name.startswith("JAX_")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "EF_JAX_PROCESSES": str(processes),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **(settings or {}),
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for process in range(processes):
            with open(f"{folder}/{process}.out", "wb") as out, open(f"{folder}/{process}.err", "wb") as err:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *(different or {}).get(process, words)],
                        env={**environment, "EF_JAX_PROCESS_ID": str(process)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        cwd=folder,
                    )
                )
        ended, peaks = [0.0] * processes, [0] * processes
        try:
            while any(process.poll() is None for process in running) and time.monotonic() < began + seconds:
                for number, process in enumerate(running):
                    if process.returncode is None:
                        ended[number] = time.monotonic()
                        peaks[number] = max(peaks[number], _peak_rss(process.pid))
                if _only_stopped(running):
                    break
                time.sleep(0.02)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [
            Outcome(
                process.returncode,
                Path(f"{folder}/{number}.out").read_text(),
                Path(f"{folder}/{number}.err").read_text(),
                ended[number],
                peaks[number],
            )
            for number, process in enumerate(running)
        ]


def _only_stopped(running: list[subprocess.Popen[bytes]]) -> bool:
    """Whether all that still runs has stopped itself."""
    return all(process.poll() is not None or _field(process.pid, "State").startswith("T") for process in running)


def _peak_rss(process: int) -> int:
    """Bytes; 0 of a process that has ended."""
    return int((_field(process, "VmHWM") or "0").split()[0]) * 1024


def _field(process: int, name: str) -> str:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:")), "")
