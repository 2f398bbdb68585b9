"""`ef-jax replay --mesh`: placements of experts on devices, compared on recorded routing."""

import argparse
from collections.abc import Sequence
from typing import Any

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES
from ef_jax.mesh.mesh_spec import MeshSpec
from ef_jax.new_file import check_new_file
from ef_jax.placement import PLACEMENTS, Placement, dispatch, place, request_scores, save_placement, token_affinity
from ef_jax.replay.capacity import Capacity
from ef_jax.replay.partitioned import PartitionedResult, PartitionedSettings, replay_partitioned
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.link_model import LinkModel

_HEAD = (
    "placement", "slots/device", "hit %", "local %", "sent rows", "returned", "MB/token", "imbalance", "stall %",
    "exchange %", "tokens/s",
)  # fmt: skip


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """`--mesh`, and what it goes by."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        metavar="expert=N",
        help="replay on N devices that share the experts and compare placements, made from the sequences of --fit",
    )
    group.add_argument(
        "--placement", default="all", metavar="LIST", help=f"some of {', '.join(PLACEMENTS)}, or all (default: all)"
    )
    group.add_argument(
        "--replicas",
        type=common.whole_number(0),
        default=0,
        metavar="N",
        help="further experts of each layer on each device (default: 0)",
    )
    group.add_argument(
        "--row-bytes",
        type=common.whole_number(1),
        metavar="N",
        help="bytes of a token's row, hidden size times item size",
    )
    group.add_argument(
        "--save-placement",
        metavar="FILE",
        help="write the one placement that --placement names, for ef-jax generate --placement; a file that exists is "
        "not overwritten",
    )
    group.add_argument("--network", metavar="RATE[+LATENCY]", help="between devices, for example 50GB/s+5us")


def _devices(text: str) -> int:
    """The devices of `"expert=8"`.

    Raises:
      InputError: it is written in another way, or has other axes.
    """
    mesh = MeshSpec.parse(text)
    if mesh.count > mesh.expert:
        raise InputError(f"mesh {text!r:.60}: a replay shares experts only; write expert=N, for example expert=8")
    return mesh.expert


def run_mesh(
    options: argparse.Namespace, trace: RoutingTrace, capacities: Sequence[Capacity], links: Sequence[LinkModel]
) -> None:
    """Compare placements, and print what they come to.

    Raises:
      InputError: an option, or options that do not go together.
    """
    devices = _devices(options.mesh)
    names = list(dict.fromkeys(word.strip() for word in options.placement.split(",") if word.strip()))
    names = list(PLACEMENTS) if "all" in names else names
    if options.save_placement is not None:
        if len(names) != 1:
            raise InputError("--save-placement writes one placement: name it with --placement, for example affine")
        check_new_file(options.save_placement)
    policy = "lru" if options.policy == "all" else options.policy
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r:.60}: give one of {', '.join(POLICIES)} with --mesh")
    for given, name in ((options.plot, "--plot"), (options.timeline, "--timeline")):
        if given is not None:
            raise InputError(f"{name} shows one device: leave it out with --mesh")
    if options.prefetch != "off" or options.predictor != "none":
        raise InputError("--mesh replays demand copies: leave --prefetch and --predictor out")
    if not 0 < options.fit < trace.sequences:
        raise InputError(
            f"--mesh needs --fit, the sequences that placements are made from: give 1 to {trace.sequences - 1}"
        )
    if len(links) > 1:
        raise InputError("--mesh replays one link: give one --bandwidth")
    settings = [
        PartitionedSettings(
            share=min(1.0, capacity.share),
            policy=policy,
            block_bytes=options.block_bytes or trace.block_bytes,
            link=links[0] if links else None,
            row_bytes=options.row_bytes,
            network=None if options.network is None else LinkModel.parse(options.network),
            layer_seconds=options.layer_time,
        )
        for capacity in capacities
    ]
    fitted, counted = trace.select(0, options.fit), trace.select(options.fit)
    batch = options.batch or devices
    rows = []
    for name in names:
        placement = place(name, fitted, devices, replicas=options.replicas)
        if options.save_placement is not None:
            save_placement(placement, options.save_placement, model=trace.model)
        run = dispatch(counted, devices, batch=batch, scores=_scores(name, fitted, counted, placement))
        for setting in settings:
            with console.status(f"replaying {name} ...", shown=True):
                rows.append(_row(name, replay_partitioned(counted, placement, run, setting), setting))
    if options.json:
        contents = {"trace": str(options.trace), "devices": devices, "batch": batch, "fit": options.fit}
        print(console.json_line({**contents, "replicas": options.replicas, "policy": policy, "results": rows}))
    else:
        print(_table(rows))


def _scores(name: str, fitted: RoutingTrace, counted: RoutingTrace, placement: Placement) -> Any:
    """How requests suit devices, where the placement was made with that in mind."""
    if name != "affine":
        return None
    return request_scores(counted, token_affinity(fitted, placement), placement.devices)


def _row(name: str, result: PartitionedResult, settings: PartitionedSettings) -> dict[str, Any]:
    timed = result.seconds > 0
    rows = result.exchange.sent + result.exchange.returned
    return {
        "placement": name,
        "capacity": settings.share,
        "slots": result.slots,
        "hit_rate": result.hit_rate,
        "misses_per_token": result.misses / result.tokens,
        **result.exchange.as_dict(),
        "exchanged_bytes_per_token": None
        if settings.row_bytes is None
        else rows * result.exchange.busiest.shape[1] * settings.row_bytes,
        "stall_share": result.stall_seconds / result.seconds if timed else None,
        "exchange_share": result.exchange_seconds / result.seconds if timed else None,
        "tokens_per_second": result.tokens / result.seconds if timed else None,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [_HEAD]
    for row in rows:
        moved = row["exchanged_bytes_per_token"]
        cells.append(
            (
                row["placement"],
                str(row["slots"]),
                f"{100 * row['hit_rate']:.1f}",
                f"{100 * row['local']:.1f}",
                f"{row['sent']:.2f}",
                f"{row['returned']:.2f}",
                "-" if moved is None else f"{moved / 1e6:.2f}",
                f"{row['rows_imbalance']:.2f}",
                *(
                    "-" if row[name] is None else f"{scale * row[name]:.1f}"
                    for name, scale in (("stall_share", 100), ("exchange_share", 100), ("tokens_per_second", 1))
                ),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    )
