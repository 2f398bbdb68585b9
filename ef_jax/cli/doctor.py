"""`ef-jax doctor`: measure this machine once, for forecasts."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.errors import InputError
from ef_jax.memory.rates import format_bandwidth, format_seconds
from ef_jax.memory.sizes import format_bytes

if TYPE_CHECKING:
    from ef_jax.forecast.profile import Profile

_DESCRIPTION = """Measure link, device memory, matrix products, disk, host memory and what the engine's layers take on
this machine, and keep the figures for `ef-jax plan --forecast`. It takes under a minute; nothing else should run."""

_ON_CPU = """without an accelerator the device is this CPU: its memory is the host's, a copy to it is one from memory to
memory by the cores that compute, and never overlaps with computing"""
_BUSY = 0.5


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option, the profile or a directory cannot be used.
    """
    options = _parser().parse_args(words)
    from ef_jax.forecast.profile import default_profile, make_directory, read_profile, write_profile

    path = default_profile() if options.profile is None else options.profile
    if options.show:
        profile = read_profile(path)
    else:
        make_directory(path)
        profile = _measure(path.parent if options.disk_directory is None else options.disk_directory)
        write_profile(path, profile)
    notes = _notes(profile)
    if options.json:
        contents = {"profile": str(path), "machine": profile.machine.as_dict(), "measured": profile.measured}
        print(console.json_line({**contents, "notes": notes}))
        return
    print(_table(profile))
    for note in notes:
        print(f"  note: {note}")
    print(f"profile: {path}")


def _measure(disk_directory: Path) -> "Profile":
    from ef_jax.inline_dispatch import dispatch_inline

    if not disk_directory.is_dir():
        raise InputError(f"there is no directory {str(disk_directory)!r:.200} to write a file in and read it")
    dispatch_inline()
    import jax

    from ef_jax.doctor import STEPS, measure_machine
    from ef_jax.progress import Progress

    with Progress(len(STEPS), "steps", "measuring") as bar:
        bar.update(0, STEPS[0])
        return measure_machine(
            jax.devices()[0], disk_directory, on_step=lambda name: bar.update(int(name != STEPS[0]), name)
        )


def _notes(profile: "Profile") -> list[str]:
    """What to know of the figures."""
    notes = [" ".join(_ON_CPU.split())] if profile.machine.platform == "cpu" else []
    run, disk = profile.measured.get("run", {}), profile.measured.get("disk", {})
    load, cores = run.get("load_average", 0.0), run.get("cores", 1)
    if load > _BUSY * cores:
        notes.append(
            f"the load average was {load:.1f} on {cores} cores: these are figures of a busy machine, measure again"
        )
    if disk.get("page_cache") == "warm":
        notes.append("the file was read from the page cache or lies in memory, so the disk rate is one of memory")
    elif disk.get("page_cache") == "unknown":
        notes.append("the kernel does not say whether the file was read from the disk or from the page cache")
    return notes


def _table(profile: "Profile") -> str:
    machine, measured = profile.machine, profile.measured
    link = measured.get("link", {})
    sizes = link.get("by_block_bytes", {})
    by_block = ", ".join(f"{format_bytes(int(size))} {format_bandwidth(rate)}" for size, rate in sizes.items())
    knee = f"; knee at {format_bytes(link['knee_bytes'])}" if "knee_bytes" in link else ""
    rows = {
        "link": f"{format_bandwidth(machine.link_bandwidth)} one way, {format_seconds(machine.link_latency)} a call",
        "link by block": by_block + knee,
        "device memory": f"{format_bytes(machine.device_memory)}, weights read at "
        f"{format_bandwidth(machine.device_bandwidth)}",
        "products": f"{machine.device_flops / 1e9:.4g} GFLOPS (16 bits)",
        "host memory": f"{format_bytes(machine.host_memory)}, copied at {format_bandwidth(machine.host_bandwidth)}",
        "host products": f"{machine.host_flops / 1e9:.4g} GFLOPS (32 bits)",
        "disk": f"{format_bandwidth(machine.disk_bandwidth)} ({measured.get('disk', {}).get('page_cache', 'unknown')})",
        "dispatch": format_seconds(measured.get("device", {}).get("dispatch", 0.0)) + " a program",
        "a layer": f"{format_seconds(machine.dispatch_seconds + machine.kernel_seconds)}, and if it may miss "
        f"{format_seconds(machine.miss_seconds)}; a missing block {format_seconds(machine.block_seconds)}; a further "
        f"sequence {format_seconds(machine.row_seconds)}",
    }  # fmt: skip
    return "\n".join([f"{machine.name} ({machine.source})", *(f"  {name:14} {text}" for name, text in rows.items())])


def _parser() -> console.Parser:
    parser = console.Parser(prog="ef-jax doctor", description=_DESCRIPTION)
    parser.add_argument(
        "--profile", type=_path, metavar="FILE", help="where the figures are kept (default: in the user's cache)"
    )
    parser.add_argument(
        "--disk-directory",
        type=_path,
        metavar="DIR",
        help="where to write a file of 256 MiB to read (default: where the profile goes)",
    )
    parser.add_argument("--show", action="store_true", help="show what was measured before, and measure nothing")
    common.add_common_options(parser)
    return parser


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not the name of a file")
    return Path(text)
