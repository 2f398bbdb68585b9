"""`ef-jax replay`: which cache policy, and how many slots, for recorded routing."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ef_jax import console
from ef_jax.cli import options as common
from ef_jax.cli.replay_mesh import add_mesh_options, run_mesh
from ef_jax.cli.replay_table import replay_table
from ef_jax.errors import InputError
from ef_jax.memory.policies import POLICIES
from ef_jax.memory.rates import parse_bandwidth, parse_seconds
from ef_jax.memory.sizes import parse_bytes
from ef_jax.new_file import check_new_file
from ef_jax.replay.capacity import parse_capacity
from ef_jax.replay.plot import plot_sweep, require_matplotlib, worth_showing
from ef_jax.replay.recommendation import Recommendation, recommend, sweep_warnings
from ef_jax.replay.replays import BOUNDS, Replays, SweepSettings
from ef_jax.replay.result import ReplayResult
from ef_jax.replay.simulator import PREDICTORS
from ef_jax.replay.sweep import choose_policies, sweep
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.link_model import LinkModel

Parsed = TypeVar("Parsed")

_DESCRIPTION = """Replay recorded routing with every cache size and policy asked for, next to the clairvoyant bounds,
and recommend one. The replay makes the very decisions that the engine would make. TRACE is a file of `ef-jax trace`,
or a plain npz with experts, tokens, offsets and num_experts."""

_EPILOG = """With --bandwidth the replay also runs a simulated link on a virtual clock and reports stalls and tokens a
second. Several bandwidths may be given; the recommendation is for the first."""


def run(words: Sequence[str]) -> None:
    """Run the command.

    Raises:
      InputError: an option or the trace cannot be used.
    """
    options = build_parser().parse_intermixed_args(words)
    if options.plot is not None:
        require_matplotlib(options.plot)
    whole = RoutingTrace.load(options.trace)
    trace = whole if options.sequences is None else whole.select(*options.sequences)
    experts = trace.layers * trace.num_experts
    block_bytes = options.block_bytes or trace.block_bytes
    capacities = [parse_capacity(word, experts=experts, block_bytes=block_bytes) for word in _words(options.capacity)]
    if not capacities:
        raise InputError("no capacity: give a share of the experts such as 0.25, or slots")
    if options.mesh is not None:
        run_mesh(options, trace, capacities, _links(options, block_bytes))
        return
    policies = choose_policies(_words(options.policy))
    settings = SweepSettings(
        batch=options.batch,
        fit=options.fit,
        block_bytes=block_bytes,
        links=_links(options, block_bytes),
        layer_seconds=options.layer_time,
        predictor=options.predictor,
        prefetch=options.prefetch,
    )
    capacities = list(dict.fromkeys(capacities))
    if options.timeline is not None:
        _require_one_replay(options.timeline, policies, len(capacities), len(settings.links))
    results = sweep(trace, capacities, policies, settings, jobs=options.jobs, progress=None)
    first = results[: len(results) // max(len(settings.links), 1)]
    recommended = recommend(first)
    warnings = [*_remarks(options, settings), *sweep_warnings(first, experts=experts)]
    if options.plot is not None:
        _plot(options.plot, results, trace, recommended, settings, _name(options.trace, trace))
    if options.timeline is not None:
        with console.status("replaying once more for the timeline ...", shown=True):
            timeline = Replays(trace, settings).timeline(policies[0], capacities[0].slots, settings.links[0])
        timeline.save(options.timeline)
    if options.json:
        print(console.json_line(_contents(options, trace, results, recommended, warnings)), flush=True)
    else:
        print(f"{_name(options.trace, trace)}\n\n{replay_table(results)}\n\n{_advice(recommended)}", flush=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _links(options: argparse.Namespace, block_bytes: int | None) -> tuple[LinkModel, ...]:
    bandwidths = [parse_bandwidth(word) for word in _words(options.bandwidth or "")]
    if bandwidths and block_bytes is None:
        raise InputError(
            "--bandwidth needs the bytes of an expert's block, which the trace does not have: give --block-bytes"
        )
    if not bandwidths:
        for name in ("latency", "block_overhead", "layer_time", "prefetch"):
            if getattr(options, name) not in (0, "off"):
                raise InputError(f"--{name.replace('_', '-')} needs a link: give --bandwidth, for example 25GB/s")
    return tuple(
        LinkModel(bandwidth=bandwidth, latency=options.latency, block_overhead=options.block_overhead)
        for bandwidth in dict.fromkeys(bandwidths)
    )


def _require_one_replay(path: Path, policies: list[str], capacities: int, links: int) -> None:
    check_new_file(path)
    if policies[0] in BOUNDS or (len(policies), capacities, links) != (1, 1, 1):
        raise InputError(
            "--timeline shows one replay over a link: give one --policy that is no bound, one --capacity and one "
            f"--bandwidth; there are {len(policies)}, {capacities} and {links}"
        )


def _remarks(options: argparse.Namespace, settings: SweepSettings) -> list[str]:
    if settings.links and not settings.layer_seconds:
        return ["without --layer-time computing takes no time, so steps last as long as the link is busy for them"]
    return []


def _plot(
    path: Path,
    results: list[ReplayResult],
    trace: RoutingTrace,
    recommended: Recommendation | None,
    settings: SweepSettings,
    title: str,
) -> None:
    shown = residency = None
    if recommended is not None:
        shown = worth_showing(results, recommended)
        with console.status("replaying once more for the picture ...", shown=True):
            replays = Replays(trace, settings)
            link = next(iter(settings.links), None)
            residency = replays.residency(shown.policy, shown.capacity.slots, link)
    plot_sweep(path, results, title=title, recommended=recommended, shown=shown, residency=residency)


def _contents(
    options: argparse.Namespace,
    trace: RoutingTrace,
    results: list[ReplayResult],
    recommended: Recommendation | None,
    warnings: list[str],
) -> dict[str, Any]:
    return {
        "trace": str(options.trace),
        "model": trace.model,
        "sequences": trace.sequences,
        "tokens": trace.count,
        "moe_layers": trace.layers,
        "experts_per_layer": trace.num_experts,
        "experts_per_token": trace.top_k,
        "lossy": trace.lossy or None,
        "fit": options.fit,
        "results": [result.as_dict() for result in results],
        "recommended": None if recommended is None else recommended.as_dict(),
        "warnings": warnings,
    }


def _name(path: str, trace: RoutingTrace) -> str:
    return (
        f"{trace.model or Path(path).stem}: {trace.sequences} sequences, {trace.count:,} tokens, "
        f"{trace.layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
        + (f", lossy: {trace.lossy}" if trace.lossy else "")
    )


def _advice(recommended: Recommendation | None) -> str:
    if recommended is None:
        return "nothing to recommend: only bounds were replayed"
    slots, share = recommended.capacity.slots, 100 * recommended.capacity.share
    line = f"recommended: {recommended.policy} with {slots} slots ({share:.4g} %): {recommended.reason}"
    return line if not recommended.warning else f"{line}\nbut {recommended.warning}"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _sequences(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    if not colon or not all(
        end == "" or (end.isascii() and end.isdecimal() and len(end) < 10) for end in (first, last)
    ):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST such as 0:60, 300: or :60, got {text!r:.60}")
    return int(first or 0), int(last) if last else None


def _as_option(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """`parse` as argparse wants it: its errors name the option."""

    def parsed(text: str) -> Parsed:
        try:
            return parse(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def build_parser() -> console.Parser:
    """The command's options."""
    parser = console.Parser(prog="ef-jax replay", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("trace", metavar="TRACE", help="routing trace")
    parser.add_argument(
        "--capacity",
        default="0.125,0.25,0.5",
        metavar="LIST",
        help="cache sizes: shares of the experts (0.25, 25%%), slots (208) or bytes (4GiB) (default: 0.125,0.25,0.5)",
    )
    names = ", ".join((*POLICIES, *BOUNDS))
    parser.add_argument("--policy", default="all", metavar="LIST", help=f"some of {names}, or all (default: all)")
    parser.add_argument(
        "--batch",
        type=common.whole_number(1),
        metavar="N",
        help="sequences side by side, every token as a step of decoding (default: as recorded)",
    )
    parser.add_argument("--sequences", type=_sequences, metavar="A:B", help="of the trace, those from A to before B")
    parser.add_argument(
        "--fit",
        type=common.whole_number(0),
        default=0,
        metavar="N",
        help="the first N sequences teach the policies and are not counted (default: 0)",
    )
    link = parser.add_argument_group("simulated link")
    link.add_argument("--bandwidth", metavar="LIST", help="one way, for example 25GB/s or 12GB/s,25GB/s,50GB/s")
    duration = _as_option(parse_seconds)
    link.add_argument("--latency", type=duration, default=0.0, metavar="TIME", help="of a copy, for example 10us")
    link.add_argument("--block-overhead", type=duration, default=0.0, metavar="TIME", help="fixed time of a block")
    link.add_argument(
        "--layer-time", type=duration, default=0.0, metavar="TIME", help="compute time of a layer of a step"
    )
    link.add_argument(
        "--block-bytes", type=_as_option(parse_bytes), metavar="SIZE", help="of one expert (default: as the trace says)"
    )
    link.add_argument(
        "--prefetch", type=common.prefetch, default="off", metavar="N", help="layers ahead, or auto (default: off)"
    )
    link.add_argument(
        "--predictor",
        choices=PREDICTORS,
        default="none",
        help="what prefetching goes by; policies hear it too. pregate needs a trace of ef-jax trace --pregate",
    )
    add_mesh_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture, for example out.png")
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="also write what ran when, for Perfetto (ui.perfetto.dev); of one policy, capacity and bandwidth",
    )
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=common.whole_number(1), default=jobs, metavar="N", help=f"processes (default: {jobs} here)"
    )
    common.add_common_options(parser)
    return parser
