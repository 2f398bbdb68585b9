"""Replays of experts partitioned over devices: each with its own slots, policy and link, all on one clock."""

import dataclasses

import numpy as np
from jaxtyping import Float64

from ef_jax.errors import InputError
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Admission, Residency
from ef_jax.placement import Dispatch, Exchange, Placement, exchange
from ef_jax.replay.simulated_link import FreeLink, SimulatedLink
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.stats import Stats


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartitionedSettings:
    """How the devices of a partitioned replay are.

    Attributes:
      share: of the experts that a device holds, those that have a slot.
      policy: who leaves a device's cache, a name of `ef_jax.memory.policies.POLICIES`.
      block_bytes: of one expert.
      link: each device's link to its host; None: copies take no time.
      row_bytes: of one token's row as it is exchanged.
      network: between devices, each sending and getting at that rate; None: exchanges take no time.
      node: devices that `network` connects; None: all of them.
      far_network: likewise between devices of different nodes, side by side with `network`.
      layer_seconds: computing of a layer besides its experts.
      block_seconds: what a device takes to read an expert's block from its own memory.

    Raises:
      InputError: a share or a size that cannot be.
    """

    share: float
    policy: str = "lru"
    block_bytes: int | None = None
    link: LinkModel | None = None
    row_bytes: int | None = None
    network: LinkModel | None = None
    node: int | None = None
    far_network: LinkModel | None = None
    layer_seconds: float = 0.0
    block_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share {self.share}: give a share of a device's experts above 0, up to 1")
        if self.link is not None and not self.block_bytes:
            raise InputError("a link needs the bytes of an expert's block: give block_bytes")
        if self.network is not None and not self.row_bytes:
            raise InputError("a network needs the bytes of a token's row: give row_bytes")
        if (self.node is None) != (self.far_network is None):
            raise InputError("nodes and a far_network go together: give both or neither")

    def exchange_seconds(self, rows: int, far_rows: int) -> float:
        """What it takes to send and get back, where the busiest device has so many rows, and so many from afar."""
        if self.network is None or self.row_bytes is None:
            return 0.0
        seconds = 2 * self.network.latency + rows * self.row_bytes / self.network.bandwidth
        if self.far_network is None or not far_rows:
            return seconds
        return max(seconds, 2 * self.far_network.latency + far_rows * self.row_bytes / self.far_network.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PartitionedResult:
    """What a partitioned replay came to; counts are of all devices together.

    Attributes:
      exchange: rows between devices, and how evenly the work is shared.
      slots: cache slots a device.
      seconds: virtual time; `stall_seconds` waiting for expert bytes, `exchange_seconds` for rows.
      layer_times: all seconds by step and layer.
    """

    exchange: Exchange
    slots: int
    steps: int
    tokens: int
    hits: int
    misses: int
    seconds: float
    stall_seconds: float
    exchange_seconds: float
    layer_times: Float64[np.ndarray, "P L"]

    @property
    def hit_rate(self) -> float:
        """Share of the distinct experts that a device needed in a layer of a step which were in its slots."""
        return self.hits / max(self.hits + self.misses, 1)


def replay_partitioned(
    trace: RoutingTrace, placement: Placement, run: Dispatch, settings: PartitionedSettings
) -> PartitionedResult:
    """Decode the sequences of a trace on several devices.

    A layer begins on all devices at once: rows go to the devices that serve them, each device has the experts that they
    need in its slots, and the rows come back. It ends when the last device is done.

    Args:
      trace: the sequences.
      placement: which device serves which expert.
      run: which device each token is on, and when.
      settings: of the devices.

    Raises:
      InputError: a placement of another shape.
    """
    if placement.holds.shape[:2] != (trace.layers, trace.num_experts):
        layers, experts = placement.holds.shape[:2]
        raise InputError(
            f"the placement is of {layers} layers of {experts} experts, and the trace has {trace.layers} of "
            f"{trace.num_experts}"
        )
    counts = exchange(trace, placement, run, node=settings.node)
    held = placement.copies // placement.devices
    slots = max(1, round(settings.share * held))
    clock = VirtualClock()
    devices = [_Device(trace, placement, settings, slots, device, clock) for device in range(placement.devices)]
    rows, bounds, _ = run.order
    times = np.zeros((len(bounds) - 1, trace.layers))
    waited = exchanged = 0.0
    for step in range(len(bounds) - 1):
        index = rows[bounds[step] : bounds[step + 1]]
        routes, homes = trace.experts[index].astype(np.int64), run.homes[index]
        tokens = trace.tokens[index].tolist()
        for device in devices:
            device.scheduler.begin_step(tokens)
        for layer in range(trace.layers):
            entered = clock.now
            spent = settings.exchange_seconds(int(counts.busiest[step, layer]), int(counts.busiest_far[step, layer]))
            clock.advance(spent)
            exchanged += spent
            began = clock.now
            servers = placement.serves[layer][routes[:, layer], homes[:, None]]
            asked = [device.ask(layer, routes[:, layer], servers) for device in devices]
            for device, admission in zip(devices, asked, strict=True):
                device.complete(admission)
            waited += clock.now - began
            clock.advance(settings.layer_seconds + settings.block_seconds * int(counts.experts[step, layer]))
            times[step, layer] = clock.now - entered
    return PartitionedResult(
        exchange=counts,
        slots=slots,
        steps=len(bounds) - 1,
        tokens=trace.count,
        hits=sum(sum(device.stats.decode.hits) for device in devices),
        misses=sum(sum(device.stats.decode.misses) for device in devices),
        seconds=clock.now,
        stall_seconds=waited,
        exchange_seconds=exchanged,
        layer_times=times,
    )


class _Device:
    """One device's slots and link."""

    def __init__(
        self,
        trace: RoutingTrace,
        placement: Placement,
        settings: PartitionedSettings,
        slots: int,
        number: int,
        clock: VirtualClock,
    ) -> None:
        shape = {"layers": trace.layers, "experts": trace.num_experts}
        self._number = number
        self.stats = Stats.empty(
            layers=trace.layers, experts=placement.copies, slots=slots, staging_slots=trace.num_experts
        )
        residency = Residency(
            **shape,
            cache_slots=slots,
            staging_slots=trace.num_experts,
            policy=make_policy(settings.policy, **shape, cache_slots=slots),
        )
        if settings.share == 1:
            for layer in range(trace.layers):
                residency.seed(layer, np.flatnonzero(placement.holds[layer, :, number]).tolist())
        link: SimulatedLink | FreeLink = FreeLink()
        if settings.link is not None and settings.block_bytes:
            link = SimulatedLink(settings.link, clock, block_bytes=settings.block_bytes)
        self.scheduler: Scheduler = Scheduler(
            residency,
            link,
            self.stats,
            block_bytes=settings.block_bytes or 0,
            wave_size=trace.num_experts,
            trial=False,
            now=lambda: clock.now,
        )

    def ask(self, layer: int, routes: np.ndarray, servers: np.ndarray) -> Admission | None:
        """Start the copies of what the rows that this device serves need; None: it serves none."""
        mine = servers == self._number
        rows = [row[chosen].tolist() for row, chosen in zip(routes, mine, strict=True) if chosen.any()]
        return self.scheduler.ask(layer, rows) if rows else None

    def complete(self, admission: Admission | None) -> None:
        """Wait for them."""
        if admission is not None:
            self.scheduler.complete(admission)
