"""What `ef-jax plan --forecast` adds to the plan: options, and a table of speeds."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from ef_jax.cli import options as common
from ef_jax.errors import InputError
from ef_jax.memory.rates import format_seconds
from ef_jax.memory.sizes import format_bytes, parse_bytes
from ef_jax.schedule.link_model import LinkModel

if TYPE_CHECKING:
    import jax

    from ef_jax.forecast import Forecast, Machine, Speed
    from ef_jax.memory.plan import MemoryRequest
    from ef_jax.spec import ModelSpec

_NEEDED = {"machine": None, "bandwidth": None, "trace": None, "miss": "fetch"}


def add_forecast_options(parser: argparse.ArgumentParser) -> None:
    """`--forecast`, and what it goes by."""
    group = parser.add_argument_group("forecast")
    group.add_argument("--forecast", action="store_true", help="also say how fast it will be, by arithmetic")
    group.add_argument(
        "--machine",
        metavar="NAME|FILE",
        help="where: a machine known by name, or a profile of ef-jax doctor (default: what ef-jax doctor has measured)",
    )
    group.add_argument("--bandwidth", metavar="RATE[+LATENCY]", help="of the link, one way, for example 25GB/s")
    common.add_miss_option(group)
    group.add_argument("--trace", metavar="FILE", help="recorded routing to replay for the hit rate, of ef-jax trace")


def chosen_machine(options: argparse.Namespace) -> "Machine | None":
    """The machine to forecast for; None: no forecast is wanted.

    Raises:
      InputError: an option that needs a forecast, a machine that is not known, or a figure that none has.
    """
    if not options.forecast:
        for name, default in _NEEDED.items():
            if getattr(options, name) != default:
                raise InputError(f"--{name.replace('_', '-')} is for forecasts: give --forecast too")
        return None
    from ef_jax.forecast import MACHINES, find_machine
    from ef_jax.forecast.profile import default_profile, read_profile

    if options.machine is not None:
        machine = find_machine(options.machine)
    elif (profile := default_profile()).is_file():
        machine = read_profile(profile).machine
    else:
        raise InputError(
            f"this machine has not been measured: run ef-jax doctor first, or give --machine {', '.join(MACHINES)}"
        )
    if options.bandwidth is not None:
        machine = machine.with_link(LinkModel.parse(options.bandwidth))
    return machine


def request_for(
    machine: "Machine", spec: "ModelSpec", device: "jax.Device", options: argparse.Namespace
) -> "MemoryRequest":
    """The memory request on that machine: what `load` would ask for there.

    Raises:
      InputError: an option is out of range.
    """
    from ef_jax.planning import make_request

    given = common.memory_options(options, batch=1)
    budget = given.pop("device_memory")
    if budget is None and given["expert_fraction"] is None:
        if machine.platform == "cpu":
            given["expert_fraction"] = 0.5
        else:
            budget = int(0.9 * machine.device_memory)
    if budget is None:
        return make_request(spec, device, **given)
    # Not limited by the device here, which may be smaller.
    request = make_request(spec, device, **{**given, "expert_fraction": 0.0})
    return dataclasses.replace(request, expert_fraction=None, device_memory=parse_bytes(budget))


def forecast_table(result: "Forecast") -> str:
    """A forecast for people."""
    machine = result.machine
    device = f"{format_bytes(result.device_bytes)} of {format_bytes(machine.device_memory)}"
    host = f"{format_bytes(result.host_bytes)} of {format_bytes(machine.host_memory)}"
    short = f"{format_bytes(result.host_short)} short" if result.host_short else "fits"
    if result.host_blocks < result.experts:
        short += f"; holds {result.host_blocks} of {result.experts} experts, the others stay on disk"
    batched = [("decode", result.batched)] if result.batched.batch > 1 else []
    rows = [("decode", result.single), *batched, ("prompt", result.prompt)]
    return "\n".join(
        [
            f"forecast on {machine.name} ({machine.source}){'' if result.miss == 'fetch' else f', miss {result.miss}'}",
            f"  {'device':12} {device:>22}  {'fits' if result.fits_device else 'does not fit'}",
            f"  {'host':12} {host:>22}  {short}",
            *(_line(name, speed) for name, speed in rows),
            f"  {'load':12} {format_seconds(result.load_seconds):>22}  at least, from disk",
            *([] if result.single.hit_rate is None else [f"  hit rate: {result.single.hit_rate.source}"]),
        ]
    )


def _line(name: str, speed: "Speed") -> str:
    label = f"{name}, {speed.batch}" if name == "decode" else name
    rate = f"{speed.tokens_per_second:.3g} tokens/s"
    moved = f"{format_bytes(round(speed.link_bytes_per_token))} a token over the link"
    if speed.disk_bytes_per_token:
        moved += f", {format_bytes(round(speed.disk_bytes_per_token))} from disk"
    hits = speed.hit_rate
    rates = (
        "" if hits is None else f", hits {100 * hits.expected:.0f} % ({100 * hits.low:.0f} to {100 * hits.high:.0f})"
    )
    return f"  {label:12} {rate:>22}  {speed.low:.3g} to {speed.high:.3g}; bound by {speed.time.bound}, {moved}{rates}"
