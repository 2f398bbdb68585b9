"""How long a pass takes on a machine, and what its time goes to."""

import dataclasses
import math
from collections.abc import Sequence

from ef_jax.forecast.machine import Machine
from ef_jax.forecast.work import LayerWork
from ef_jax.schedule.miss_costs import Miss


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of a pass by what they go to, and bytes over the link and from disk.

    Attributes:
      link: waiting for expert bytes, what computing hides left out.
      disk: the same, of bytes that come from disk first.
      host: waiting for experts that the CPU computes where they are.
      memory: reading weights and caches, and putting blocks into slots.
      compute: products, in layers where they take longer than reading.
      dispatch: host work, and kernels that start and end.
      link_bytes: of expert blocks.
      disk_bytes: of expert blocks.
    """

    link: float
    disk: float
    host: float
    memory: float
    compute: float
    dispatch: float
    link_bytes: float
    disk_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return sum(self._parts.values())

    @property
    def bound(self) -> str:
        """What takes most of it: "link", "disk", "host", "device memory", "compute" or "dispatch"."""
        parts = self._parts
        return max(parts, key=lambda name: parts[name])

    @property
    def _parts(self) -> dict[str, float]:
        return {
            "link": self.link, "disk": self.disk, "host": self.host, "device memory": self.memory,
            "compute": self.compute, "dispatch": self.dispatch,
        }  # fmt: skip


def step_time(
    work: Sequence[LayerWork],
    machine: Machine,
    *,
    batch: int,
    block_bytes: int,
    hit_rate: float,
    resident: bool,
    prefetched: float,
    host_hit_rate: float = 1.0,
    miss: Miss = "fetch",
) -> PassTime:
    """A step of decoding, a layer at a time:

        device   = max(bytes read / device_bandwidth, operations / device_flops) + kernel_seconds
                   + (batch - 1) row_seconds
        misses   = experts in use x (1 - hit rate)
        absent   = experts in use x (1 - the larger of hit rate and host hit rate)
        crossing = misses x (block / link_bandwidth + block_seconds) + min(1, misses) x link_latency
        reading  = absent x block / disk_bandwidth
        insert   = misses x block / insert_bandwidth
        host     = dispatch_seconds + miss_seconds
        layer    = device + insert + host + crossing + reading
                   - min(prefetched x (crossing + reading), device + host)

    Demand copies are waited for, since a layer asks for them when it is their turn. Where copies cross while the device
    computes, the share `prefetched` of them was predicted and began earlier, but not more of it than fits behind one
    layer's time: so with `prefetched` = 1 a layer takes the longer of link and computing. What is prefetched for
    nothing uses the link only while it is idle, and costs nothing here.

    A layer that cannot miss has no `miss_seconds`, and on a GPU its host work overlaps with the device's: it takes the
    longer of the two.

    A miss that the host's CPU computes where it is does not cross. It takes the longer of reading its block at
    `host_bandwidth` and multiplying its rows at `host_flops`; rows cross and come back for twice `link_latency`. CPU
    and link work side by side, so that a layer waits for the slower one. "auto" shares the misses so that both are done
    together, or fetches all where prefetching makes that faster.

    Args:
      work: of `step_work`.
      machine: its figures.
      batch: sequences of the step.
      block_bytes: of one expert.
      hit_rate: share of the distinct experts in use that are in slots.
      resident: every expert has a slot.
      prefetched: share of the misses that are on their way before they are asked for; 0 on a CPU.
      host_hit_rate: share of the distinct experts in use that are in slots or in host memory; the others come from
        disk.
      miss: what becomes of misses.
    """
    overlaps = machine.platform == "gpu"
    total = _Sum()
    for layer in work:
        misses = 0.0 if resident else layer.experts * (1 - hit_rate)
        device = total.device(layer, machine, rows=batch)
        if resident or not layer.experts:
            host = max(0.0, machine.dispatch_seconds - device) if overlaps else machine.dispatch_seconds
        else:
            host = machine.dispatch_seconds + machine.miss_seconds
        total.dispatch += host
        absent = 0.0 if resident else layer.experts * (1 - max(hit_rate, host_hit_rate))
        reading = total.reading(absent, machine, block_bytes)
        crossing = _crossing(misses, machine, block_bytes, calls=min(1.0, misses))
        hidden = min(prefetched * (crossing + reading), device + host) if overlaps else 0.0
        shown = 1 - hidden / (crossing + reading) if misses else 0.0
        fetched, waited = _split(layer, machine, misses, shown * crossing, block_bytes=block_bytes, miss=miss)
        total.entering(fetched, machine, block_bytes)
        total.disk += shown * reading
        if fetched:
            total.link += waited
        else:
            total.host += waited
    return total.done()


def _crossing(misses: float, machine: Machine, block_bytes: int, *, calls: float) -> float:
    """How long the link is busy with some blocks."""
    return misses * (block_bytes / machine.link_bandwidth + machine.block_seconds) + calls * machine.link_latency


def _split(
    layer: LayerWork, machine: Machine, misses: float, crossing: float, *, block_bytes: int, miss: Miss
) -> tuple[float, float]:
    """How many of a layer's misses cross, and how long they and those that the CPU computes are waited for.

    Args:
      crossing: what is waited for if all of them cross.
    """
    if not misses or miss == "fetch":
        return misses, crossing
    products = layer.expert_operations / layer.experts / machine.host_flops
    computing = max(block_bytes / machine.host_bandwidth, products)
    there_and_back = 2 * machine.link_latency
    if miss == "compute":
        return 0.0, misses * computing + there_and_back
    alone = _crossing(1.0, machine, block_bytes, calls=0.0)
    share = computing / (computing + alone)
    together = misses * share * alone + there_and_back
    return (misses * share, together) if together < crossing else (misses, crossing)


def prompt_time(
    work: Sequence[LayerWork],
    machine: Machine,
    *,
    block_bytes: int,
    cached: float,
    resident: bool,
    staging_slots: int,
    on_host: float = 1.0,
) -> PassTime:
    """A pass of prompt tokens, a layer at a time: blocks stream through the staging ring in waves.

        misses = experts in use x (1 - share of the experts in slots)
        waves  = 1 + misses / staging slots
        absent = experts in use x (1 - share of the experts in slots or on the host, `on_host`)
        layer  = max(device + insert, crossing, reading) + waves x dispatch_seconds + miss_seconds

    `device`, `crossing` (with a call's latency a wave), `reading` and `insert` are those of `step_time`; on a CPU all
    but `reading` add up.
    """
    overlaps = machine.platform == "gpu"
    total = _Sum()
    for layer in work:
        misses = 0.0 if resident else layer.experts * (1 - cached)
        waves = 1 + math.ceil(misses / max(1, staging_slots)) if misses else 1
        device = total.device(layer, machine, rows=1)
        before = total.memory
        total.entering(misses, machine, block_bytes)
        crossing = _crossing(misses, machine, block_bytes, calls=waves if misses else 0)
        computing = device + total.memory - before
        link = crossing - (min(crossing, computing) if overlaps else 0.0)
        reading = total.reading(layer.experts * (1 - max(cached, on_host)), machine, block_bytes)
        total.link += link
        total.disk += max(0.0, reading - computing - link)
        total.dispatch += waves * machine.dispatch_seconds + (machine.miss_seconds if misses else 0.0)
    return total.done()


class _Sum:
    """A pass's seconds as they add up."""

    def __init__(self) -> None:
        self.link = self.disk = self.host = self.memory = self.compute = self.dispatch = 0.0
        self.link_bytes = self.disk_bytes = 0.0

    def device(self, layer: LayerWork, machine: Machine, *, rows: int) -> float:
        """Add what the device takes for a layer; how long that is."""
        reading = layer.read_bytes / machine.device_bandwidth
        products = layer.operations / machine.device_flops
        fixed = machine.kernel_seconds + (rows - 1) * machine.row_seconds
        if products > reading:
            self.compute += products
        else:
            self.memory += reading
        self.dispatch += fixed
        return max(reading, products) + fixed

    def entering(self, blocks: float, machine: Machine, block_bytes: int) -> None:
        """Add blocks that cross the link and enter slots."""
        self.link_bytes += blocks * block_bytes
        if machine.insert_bandwidth is not None:
            self.memory += blocks * block_bytes / machine.insert_bandwidth

    def reading(self, blocks: float, machine: Machine, block_bytes: int) -> float:
        """Count blocks that come from disk; how long the disk is busy."""
        self.disk_bytes += blocks * block_bytes
        return blocks * block_bytes / machine.disk_bandwidth

    def done(self) -> PassTime:
        return PassTime(**vars(self))
