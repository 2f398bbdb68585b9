"""The host side of a memory plan: how many expert blocks host memory holds, and whether the machine has it."""

import dataclasses
from pathlib import Path

from ef_jax.errors import BudgetError
from ef_jax.memory.device_share import DeviceShare
from ef_jax.memory.sizes import format_bytes
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.spec import ModelSpec
from ef_jax.weights.block_reader import read_bytes

THREADS = 4
"""Reads under way at most: 2 already keep the virtual disk of `bench.disk` busy, and more cost nothing."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostPlan:
    """A host pool that does not hold every block.

    Attributes:
      places: blocks that it holds.
      passing: reads that a prompt, or a step, has on their way at most.
      wave: blocks that a link takes together.
      place_bytes: of one place, whole pages.
    """

    places: int
    passing: int
    wave: int
    place_bytes: int

    @property
    def on_their_way(self) -> int:
        """Blocks that exist besides those in places."""
        return self.passing + self.wave

    @property
    def nbytes(self) -> int:
        """Host bytes of all of them."""
        return (self.places + self.on_their_way) * self.place_bytes


def make_host_plan(
    spec: ModelSpec, host_memory: int, *, step: int, staging_slots: int, share: DeviceShare | None = None
) -> HostPlan | None:
    """Share host memory out: blocks on their way first, places get the rest; None: every block fits.

    On a mesh it is the plan of one device, and each of the process's devices has as much of the memory.

    Args:
      spec: the model.
      host_memory: bytes for expert blocks.
      step: the most experts that one layer of a step can need.
      staging_slots: blocks that a wave of a prompt takes.
      share: what the device has of a mesh; None: all.

    Raises:
      BudgetError: it holds less than one layer of a step needs.
    """
    held = spec.total_experts if share is None else share.held
    devices = 1 if share is None else share.local_devices
    if host_memory >= devices * held * spec.block_bytes:
        return None
    wave = max(step, staging_slots, min(MAX_INSERT, spec.experts.count))
    empty = HostPlan(places=0, passing=wave + THREADS, wave=wave, place_bytes=read_bytes(spec))
    places = (host_memory // devices - empty.nbytes) // empty.place_bytes
    if places < step:
        least = devices * (empty.nbytes + step * empty.place_bytes)
        raise BudgetError(
            f"host_memory {format_bytes(host_memory)} is too small: this model needs at least {least} bytes "
            f"({-(-least // 10**6)}MB), for {step} expert blocks of a step and {empty.on_their_way} on their way"
        )
    return dataclasses.replace(empty, places=min(places, held))


def check_available(nbytes: int, *, pages: bool, mesh: bool = False) -> None:
    """Refuse to take more host memory than there is.

    Args:
      nbytes: what will be allocated.
      pages: blocks are paged from disk already.
      mesh: they are those of a mesh's devices, whose experts are all in host memory.

    Raises:
      BudgetError: the machine, or the control group that this process is in, has less.
    """
    available = available_memory()
    if available is None or nbytes <= available:
        return
    fix = "give less" if pages else "give it, for example half of that: it keeps the other experts on disk"
    fix = "share the experts among devices of more hosts" if mesh else f"host_memory bounds it: {fix}"
    raise BudgetError(
        f"loading needs {format_bytes(nbytes)} of host memory and {format_bytes(available)} are available; {fix}"
    )


def available_memory() -> int | None:
    """Bytes that can still be allocated without swapping; None where the system does not say."""
    found = []
    try:
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text())
        found.append(limit - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):
        pass
    return min(found, default=None)
