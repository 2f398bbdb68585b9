"""What binds when experts are shared by 8 to 512 devices? A simulation on recorded routing: nobody has run it.

    python -m bench.scale TRACE [--fit 100] [--slots 52 104] [--save] [--plot PNG]

TRACE is a plain npz of routing, of a model with a few dozen experts a layer. Its first sequences make the placements,
the others are decoded, 48 tokens of each, on a virtual clock: every device has its own slots, policy (`lru`) and link,
layers begin and end on all devices at once (`ef_jax.replay.partitioned`).

Devices of one group share the experts ("expert" axis); groups are copies of one another ("data" axis) and exchange
nothing when decoding, so a machine of N devices is N / expert groups, each as fast as one. A device has the same
memory whatever the group: with more devices in a group, more of its own experts have slots, and more rows cross.

Figures of devices, stated and not measured: memory, link and host as `h100-sxm-pcie5` of `ef_jax.forecast.MACHINES`;
between the 8 devices of a node 360 GB/s each way (80 % of NVLink 4's 450) and 3 us; between nodes 40 GB/s a device
(80 % of 400 Gb/s) and 8 us; 120 us a layer besides experts and exchanges. Blocks and rows are those of
DeepSeek-V2-Lite in bfloat16, unless options say otherwise.

Prints tables, then one line of JSON.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench import _report
from bench._report import rounded
from ef_jax.errors import InputError
from ef_jax.forecast import MACHINES
from ef_jax.placement import PLACEMENTS, dispatch, place
from ef_jax.replay.partitioned import PartitionedResult, PartitionedSettings, replay_partitioned
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.link_model import LinkModel

TOKENS = 48
NODE = 8
DEVICES = (8, 16, 32, 64, 128, 256, 512)
GROUPS = (8, 16, 32, 64)
MACHINE = MACHINES["h100-sxm-pcie5"]
NETWORK = LinkModel(bandwidth=360e9, latency=3e-6)
FAR_NETWORK = LinkModel(bandwidth=40e9, latency=8e-6)
LAYER_SECONDS = 120e-6


def main() -> int:
    """Run the bench; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument("--fit", type=_report.positive, default=100, help="sequences that make the placements")
    parser.add_argument("--sequences", type=_report.positive, default=4, help="of a device, side by side")
    parser.add_argument("--slots", nargs="+", type=_report.positive, default=[52, 104], help="of a device")
    parser.add_argument("--block-bytes", type=_report.positive, default=3 * 2048 * 1408 * 2)
    parser.add_argument("--row-bytes", type=_report.positive, default=2048 * 2)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw a picture")
    _report.add_save_option(parser, "scale")
    options = parser.parse_args()
    rows = run(options)
    if options.plot is not None:
        from bench import _scale_plot

        _scale_plot.draw(rows, options.plot)
    figures = {
        "machine": MACHINE.as_dict(),
        "network": dataclasses.asdict(NETWORK),
        "far_network": dataclasses.asdict(FAR_NETWORK),
        "layer_seconds": LAYER_SECONDS,
    }
    settings = {name: getattr(options, name) for name in ("fit", "sequences", "slots", "block_bytes", "row_bytes")}
    _report.finish("scale", {"settings": settings, "figures": figures, "rows": rows}, options.save)
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the tables, and return the rows."""
    whole = RoutingTrace.load(options.trace)
    if options.fit >= whole.sequences:
        raise InputError(f"--fit {options.fit} leaves none of {whole.sequences} sequences to decode")
    fitted, counted = whole.select(0, options.fit), _first_tokens(whole.select(options.fit), TOKENS)
    groups = [count for count in GROUPS if whole.num_experts % count == 0]
    rows = []
    for slots in options.slots:
        for count in groups:
            for name in PLACEMENTS:
                rows.append(_row(fitted, counted, count, slots, name, options))
        print(f"\n{slots} slots a device, {options.sequences} sequences a device\n")
        print(_table([row for row in rows if row["slots"] == slots]))
    print("\ntokens/s of all devices, by the best group and placement\n")
    head = ["devices", *(f"{slots} slots" for slots in options.slots)]
    print(
        _report.table(
            head, ([str(count), *(_best(rows, slots, count) for slots in options.slots)] for count in DEVICES)
        )
    )
    return rows


def _first_tokens(trace: RoutingTrace, count: int) -> RoutingTrace:
    """The first tokens of every sequence that has as many."""
    starts = trace.offsets[:-1][np.diff(trace.offsets) >= count]
    index = (starts[:, None] + np.arange(count)).ravel()
    return RoutingTrace(
        experts=trace.experts[index],
        tokens=trace.tokens[index],
        offsets=np.arange(0, len(index) + 1, count),
        num_experts=trace.num_experts,
        phases=trace.phases[index],
    )


def _row(
    fitted: RoutingTrace, counted: RoutingTrace, devices: int, slots: int, name: str, options: argparse.Namespace
) -> dict[str, Any]:
    batch = options.sequences * devices
    if counted.sequences < batch:
        raise InputError(f"{batch} sequences side by side are more than the {counted.sequences} there are: give fewer")
    whole = counted.select(0, counted.sequences // batch * batch)  # every step is full
    held = fitted.layers * fitted.num_experts // devices
    apart = devices > NODE
    settings = PartitionedSettings(
        share=min(1.0, slots / held),
        block_bytes=options.block_bytes,
        link=LinkModel(bandwidth=MACHINE.link_bandwidth, latency=MACHINE.link_latency),
        row_bytes=options.row_bytes,
        network=NETWORK,
        node=NODE if apart else None,
        far_network=FAR_NETWORK if apart else None,
        layer_seconds=LAYER_SECONDS,
        block_seconds=options.block_bytes / MACHINE.device_bandwidth,
    )
    placement = place(name, fitted, devices)
    found = replay_partitioned(whole, placement, dispatch(whole, devices, batch=batch), settings)
    return {
        "group": devices,
        "slots": slots,
        "share": rounded(settings.share),
        "placement": name,
        "hit_rate": rounded(found.hit_rate),
        **{key: rounded(value) for key, value in found.exchange.as_dict().items()},
        **_times(found),
        "tokens_per_second_per_device": rounded(found.tokens / found.seconds / devices),
    }


def _times(found: PartitionedResult) -> dict[str, Any]:
    """Milliseconds of a step by what they go to, and what most goes to."""
    parts = {
        "stall": found.stall_seconds,
        "exchange": found.exchange_seconds,
        "compute": found.seconds - found.stall_seconds - found.exchange_seconds,
    }
    scale = 1e3 / found.steps
    return {
        **{f"{name}_ms": rounded(scale * seconds) for name, seconds in parts.items()},
        "step_ms": rounded(scale * found.seconds),
        "bound": max(parts, key=lambda name: parts[name]),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["placement", "group", "share %", "hit %", "sent", "imbalance", "stall ms", "exchange ms", "compute ms",
            "step ms", "tokens/s/device", "bound"]  # fmt: skip
    return _report.table(
        head,
        (
            [
                row["placement"], row["group"], 100 * row["share"], 100 * row["hit_rate"], row["sent"],
                row["experts_imbalance"], row["stall_ms"], row["exchange_ms"], row["compute_ms"], row["step_ms"],
                row["tokens_per_second_per_device"], row["bound"],
            ]
            for row in rows
        ),
    )  # fmt: skip


def _best(rows: list[dict[str, Any]], slots: int, devices: int) -> str:
    """The fastest way to use so many devices."""
    fits = [row for row in rows if row["slots"] == slots and row["group"] <= devices]
    best = max(fits, key=lambda row: row["tokens_per_second_per_device"])
    total = devices * best["tokens_per_second_per_device"]
    return (
        f"{total:,.0f} (expert={best['group']} data={devices // best['group']}, {best['placement']}, {best['bound']})"
    )


if __name__ == "__main__":
    sys.exit(_report.run("scale", main))
