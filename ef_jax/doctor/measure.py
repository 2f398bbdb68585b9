"""Every figure of a `Profile`, one measurement after another."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ef_jax.doctor.compute import measure_device, measure_host
from ef_jax.doctor.disk import measure_disk
from ef_jax.doctor.engine import measure_engine
from ef_jax.doctor.link import measure_link
from ef_jax.forecast.machine import Machine
from ef_jax.forecast.profile import Profile

STEPS = ("link", "device", "host", "disk", "engine")
"""What is measured, in order."""

_DOUBT = 0.1  # runs on a quiet machine repeat within 5 to 10 %


def measure_machine(
    device: jax.Device, disk_directory: Path, *, on_step: Callable[[str], None] = lambda name: None
) -> Profile:
    """Measure a device and its host.

    Args:
      device: the device.
      disk_directory: where to write a file to read.
      on_step: told the name of each step of `STEPS` before it begins.

    Raises:
      InputError: the file cannot be written.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in STEPS:
        on_step(name)
        if name == "link":
            found[name] = measure_link(device)
        elif name == "device":
            found[name] = measure_device(device)
        elif name == "host":
            found[name] = measure_host()
        elif name == "disk":
            found[name] = measure_disk(disk_directory)
        else:
            found[name] = measure_engine(
                device_bandwidth=found["device"]["bandwidth"],
                device_flops=found["device"]["flops"],
                link_bandwidth=found["link"]["bandwidth"],
            )
    return Profile(machine=_machine(device, found), measured={**found, "run": _run_description(device)})


def _machine(device: jax.Device, found: dict[str, dict[str, Any]]) -> Machine:
    link, computing, host, engine = found["link"], found["device"], found["host"], found["engine"]
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = device.platform == "cpu"
    limit = (device.memory_stats() or {}).get("bytes_limit")
    # On an accelerator an all-resident layer takes the longer of host and device, and what more the host takes of one
    # that may miss is in miss_seconds.
    dispatch = engine["layer_seconds"] if cpu else computing["dispatch"]
    return Machine(
        name=device.device_kind if not cpu else "this CPU",
        platform="cpu" if cpu else "gpu",
        device_memory=ram if limit is None else limit,
        host_memory=ram,
        device_bandwidth=computing["bandwidth"],
        device_flops=computing["flops"],
        link_bandwidth=link["bandwidth"],
        link_latency=link["latency"],
        insert_bandwidth=None if cpu else computing["bandwidth"] / 2,
        block_seconds=engine["block_seconds"],
        dispatch_seconds=dispatch,
        kernel_seconds=0.0 if cpu else engine["layer_seconds"],
        miss_seconds=engine["miss_seconds"],
        row_seconds=engine["row_seconds"],
        disk_bandwidth=found["disk"]["bandwidth"],
        host_bandwidth=host["bandwidth"],
        host_flops=host["flops"],
        doubt=_DOUBT,
        source="measured by ef-jax doctor",
    )


def _run_description(device: jax.Device) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
