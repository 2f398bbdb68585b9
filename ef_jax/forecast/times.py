"""How long a pass takes on a machine, and what its time goes to."""

import dataclasses
import math
from collections.abc import Sequence

from ef_jax.forecast.machine import Machine
from ef_jax.forecast.work import LayerWork


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of a pass by what they go to, and bytes over the link.

    Attributes:
      link: waiting for expert bytes, what computing hides left out.
      memory: reading weights and caches, and putting blocks into slots.
      compute: products, in layers where they take longer than reading.
      dispatch: host work, and kernels that start and end.
      link_bytes: of expert blocks.
    """

    link: float
    memory: float
    compute: float
    dispatch: float
    link_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.link + self.memory + self.compute + self.dispatch

    @property
    def bound(self) -> str:
        """What takes most of it: "link", "device memory", "compute" or "dispatch"."""
        parts = {
            "link": self.link, "device memory": self.memory, "compute": self.compute, "dispatch": self.dispatch
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def step_time(
    work: Sequence[LayerWork],
    machine: Machine,
    *,
    batch: int,
    block_bytes: int,
    hit_rate: float,
    resident: bool,
    prefetched: float,
) -> PassTime:
    """A step of decoding, a layer at a time:

        device   = max(bytes read / device_bandwidth, operations / device_flops) + kernel_seconds
                   + (batch - 1) row_seconds
        misses   = experts in use x (1 - hit rate)
        crossing = misses x (block / link_bandwidth + block_seconds) + min(1, misses) x link_latency
        insert   = misses x block / insert_bandwidth
        host     = dispatch_seconds + miss_seconds
        layer    = device + insert + host + crossing - min(prefetched x crossing, device + host)

    Demand copies are waited for, since a layer asks for them when it is their turn. Where copies cross while the device
    computes, the share `prefetched` of them was predicted and began earlier, but not more of it than fits behind one
    layer's time: so with `prefetched` = 1 a layer takes the longer of link and computing. What is prefetched for
    nothing uses the link only while it is idle, and costs nothing here.

    A layer that cannot miss has no `miss_seconds`, and on a GPU its host work overlaps with the device's: it takes the
    longer of the two.

    Args:
      work: of `step_work`.
      machine: its figures.
      batch: sequences of the step.
      block_bytes: of one expert.
      hit_rate: share of the distinct experts in use that are in slots.
      resident: every expert has a slot.
      prefetched: share of the misses that are on their way before they are asked for; 0 on a CPU.
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
        crossing = total.crossing(misses, machine, block_bytes, calls=min(1.0, misses))
        total.link += crossing - (min(prefetched * crossing, device + host) if overlaps else 0.0)
    return total.done()


def prompt_time(
    work: Sequence[LayerWork],
    machine: Machine,
    *,
    block_bytes: int,
    cached: float,
    resident: bool,
    staging_slots: int,
) -> PassTime:
    """A pass of prompt tokens, a layer at a time: blocks stream through the staging ring in waves.

        misses = experts in use x (1 - share of the experts in slots)
        waves  = 1 + misses / staging slots
        layer  = max(device + insert, crossing) + waves x dispatch_seconds + miss_seconds

    `device`, `crossing` (with a call's latency a wave) and `insert` are those of `step_time`; on a CPU they add up.
    """
    overlaps = machine.platform == "gpu"
    total = _Sum()
    for layer in work:
        misses = 0.0 if resident else layer.experts * (1 - cached)
        waves = 1 + math.ceil(misses / max(1, staging_slots)) if misses else 1
        device = total.device(layer, machine, rows=1)
        before = total.memory
        crossing = total.crossing(misses, machine, block_bytes, calls=waves if misses else 0)
        hidden = min(crossing, device + total.memory - before) if overlaps else 0.0
        total.link += crossing - hidden
        total.dispatch += waves * machine.dispatch_seconds + (machine.miss_seconds if misses else 0.0)
    return total.done()


class _Sum:
    """A pass's seconds as they add up."""

    def __init__(self) -> None:
        self.link = self.memory = self.compute = self.dispatch = self.link_bytes = 0.0

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

    def crossing(self, misses: float, machine: Machine, block_bytes: int, *, calls: float) -> float:
        """Add what entering slots takes; how long the link is busy."""
        self.link_bytes += misses * block_bytes
        if machine.insert_bandwidth is not None:
            self.memory += misses * block_bytes / machine.insert_bandwidth
        return misses * (block_bytes / machine.link_bandwidth + machine.block_seconds) + calls * machine.link_latency

    def done(self) -> PassTime:
        return PassTime(
            link=self.link, memory=self.memory, compute=self.compute, dispatch=self.dispatch,
            link_bytes=self.link_bytes,
        )  # fmt: skip
