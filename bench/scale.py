"""What binds when experts are shared by 8 to 512 devices? A simulation on recorded routing: nobody has run it.

    python -m bench.scale TRACE [--fit 100] [--slots 52 104] [--save] [--plot PNG]

TRACE is a plain npz of routing, of a model with a few dozen experts a layer. Its first sequences make the placements,
the others are decoded, 48 tokens of each, on a virtual clock: every device has its own slots, policy (`lru`) and link,
layers begin and end on all devices at once (`ef_jax.replay.partitioned`).

Devices of one group share the experts ("expert" axis); groups are copies of one another ("data" axis) and exchange
nothing when decoding, so a machine of N devices is N / expert groups, each as fast as one. A device has the same
memory whatever the group: with more devices in a group, more of its own experts have slots, and more rows cross.
Groups that an engine steps together do wait for one another: "together" is of as many groups as the trace has sequences
for, each decoding its own, every layer as long as the slowest one's.

Requests of "affine" go where their experts are, by the first 32 of their tokens, which are also decoded: in its favour.

Figures of devices, stated and not measured: memory, link and host as `h100-sxm-pcie5` of `ef_jax.forecast.MACHINES`;
between the 8 devices of a node 360 GB/s each way (80 % of NVLink 4's 450) and 3 us; between nodes 40 GB/s a device
(80 % of 400 Gb/s) and 8 us; 120 us a layer besides experts and exchanges. Blocks and rows are those of
DeepSeek-V2-Lite in bfloat16, unless options say otherwise.

Prompts are not replayed. What it gains to exchange one micro-batch's rows while another's experts are computed is
predicted by `ef_jax.mesh.overlap` from the same figures.

Prints tables, then one line of JSON; `scale.md` is the page of the saved one.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench import _report, _scale_prompts
from bench._report import rounded
from ef_jax.errors import InputError
from ef_jax.forecast import MACHINES
from ef_jax.placement import PLACEMENTS, dispatch, place, request_scores, token_affinity
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
    found = run(options)
    if options.plot is not None:
        from bench import _scale_plot

        _scale_plot.draw(found["rows"], found["machines"], options.plot)
    figures = {
        "machine": MACHINE.as_dict(),
        "network": dataclasses.asdict(NETWORK),
        "far_network": dataclasses.asdict(FAR_NETWORK),
        "layer_seconds": LAYER_SECONDS,
    }
    settings = {name: getattr(options, name) for name in ("fit", "sequences", "slots", "block_bytes", "row_bytes")}
    _report.finish("scale", {"settings": settings, "figures": figures, **found}, options.save)
    return 0


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Print the tables, and return their rows: of groups, of whole machines, and of prompts."""
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
        print(_table(_GROUP_HEAD, (row for row in rows if row["slots"] == slots)))
    machines = [_machine(rows, slots, count) for slots in options.slots for count in DEVICES]
    print("\nMachines by the fastest group and placement\n")
    print(_table(_MACHINE_HEAD, machines))
    figures = _scale_prompts.Figures(
        machine=MACHINE, network=NETWORK, far_network=FAR_NETWORK, node=NODE, layer_seconds=LAYER_SECONDS,
        block_bytes=options.block_bytes, row_bytes=options.row_bytes,
        layers=whole.layers, num_experts=whole.num_experts, top_k=whole.top_k,
    )  # fmt: skip
    balanced = (row for row in rows if row["placement"] == "balanced")
    prompts = [found for row in balanced for found in _scale_prompts.predict(row, figures)]
    print("\nA pass of all layers, cut into micro-batches: predicted\n")
    print(_table(_PROMPT_HEAD, prompts))
    return {"rows": rows, "machines": machines, "prompts": prompts}


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
    scores = request_scores(whole, token_affinity(fitted, placement), devices) if name == "affine" else None
    found = replay_partitioned(whole, placement, dispatch(whole, devices, batch=batch, scores=scores), settings)
    return {
        "group": devices,
        "slots": slots,
        "share": rounded(settings.share),
        "placement": name,
        "hit_rate": rounded(found.hit_rate),
        **{key: rounded(value) for key, value in found.exchange.as_dict().items()},
        **_times(found),
        **_copies(found),
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


def _copies(found: PartitionedResult) -> dict[str, Any]:
    """Of groups that decode what this one did batch after batch, each a batch: on their own, and together."""
    times = found.layer_times.reshape(-1, TOKENS, found.layer_times.shape[1])
    return {
        "copies": len(times),
        "slowest_copy_ms": rounded(1e3 * times.sum(axis=(1, 2)).max() / TOKENS),
        "together_ms": rounded(1e3 * times.max(axis=0).sum() / TOKENS),
    }


def _machine(rows: list[dict[str, Any]], slots: int, devices: int) -> dict[str, Any]:
    """The fastest way to use so many devices."""
    fits = [row for row in rows if row["slots"] == slots and row["group"] <= devices]
    best = max(fits, key=lambda row: row["tokens_per_second_per_device"])
    return {
        **best,
        "devices": devices,
        "data": devices // best["group"],
        "exchange_share": rounded(best["exchange_ms"] / best["step_ms"]),
        "tokens_per_second": rounded(devices * best["tokens_per_second_per_device"]),
    }


_GROUP_HEAD = {
    "placement": "placement", "group": "group", "share": "share %", "hit_rate": "hit %", "sent": "sent",
    "experts_imbalance": "imbalance", "stall_ms": "stall ms", "exchange_ms": "exchange ms", "compute_ms": "compute ms",
    "step_ms": "step ms", "tokens_per_second_per_device": "tokens/s/device", "bound": "bound", "copies": "copies",
    "slowest_copy_ms": "slowest ms", "together_ms": "together ms",
}  # fmt: skip
_MACHINE_HEAD = {
    "devices": "devices", "slots": "slots", "data": "data", "group": "expert", "placement": "placement",
    "step_ms": "step ms", "stall_ms": "stall ms", "experts_imbalance": "imbalance", "exchange_share": "exchange %",
    "hit_rate": "hit %", "tokens_per_second_per_device": "tokens/s/device", "tokens_per_second": "tokens/s",
    "bound": "bound",
}  # fmt: skip
_PROMPT_HEAD = {
    "slots": "slots", "group": "group", "tokens": "tokens", "whole_ms": "whole ms", "two_ms": "in two ms",
    "micro_batches": "best", "cut_ms": "best ms", "gain": "gain",
}  # fmt: skip


def _table(head: dict[str, str], rows: Iterable[dict[str, Any]]) -> str:
    """The columns of `head`, shares in per cent."""
    cells = ([100 * row[key] if title.endswith("%") else row[key] for key, title in head.items()] for row in rows)
    return _report.table(list(head.values()), cells)


if __name__ == "__main__":
    sys.exit(_report.run("scale", main))
