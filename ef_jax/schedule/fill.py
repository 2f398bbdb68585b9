"""Filling slots once and for all, where there is one for every expert of a device."""

from collections.abc import Sequence

from ef_jax.memory.residency import Residency
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.schedule.device_link import DeviceLink


def fill(residency: Residency, link: DeviceLink, experts: Sequence[Sequence[int]]) -> None:
    """Put experts into free slots, of which there are enough; the link's counts begin after it.

    Args:
      residency: where they are noted.
      link: copies them.
      experts: of each MoE layer.
    """
    for layer, of_layer in enumerate(experts):
        for first in range(0, len(of_layer), MAX_INSERT):
            part = of_layer[first : first + MAX_INSERT]
            slots = [residency.displace(layer, expert, None) for expert in part]
            link.finish(link.start(layer, part), slots)
            link.pool.latest.block_until_ready()
            for expert in part:
                residency.arrive(layer, expert, used=True)
    link.bytes_moved, link.seconds = 0, 0.0
