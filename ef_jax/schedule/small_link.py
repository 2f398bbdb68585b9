"""Copies of smaller blocks, of a store and a pool of their own, over the wire that another link uses."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from ef_jax.memory.policies import Key
from ef_jax.memory.slot_pool import SlotPool
from ef_jax.schedule.device_link import Coming, DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink


class SmallCopy(NamedTuple):
    """A started copy: its keys, its blocks, and when the wire has them across."""

    keys: list[Key]
    blocks: list[jax.Array] | Coming
    ready: float


class SmallLink:
    """Copies small blocks on demand. They take their turn on the wire and count among the bytes that it moves.

    Args:
      copies: copies blocks of the small store into the small pool.
      wire: the link of the step's own blocks.
    """

    def __init__(self, copies: DeviceLink, wire: DeviceLink | EmulatedLink) -> None:
        self._copies, self._wire = copies, wire
        self.block_bytes = copies.block_bytes

    @property
    def pool(self) -> SlotPool:
        """The small pool; its array is replaced by every `finish`."""
        return self._copies.pool

    def start(self, layer: int, experts: Sequence[int]) -> SmallCopy:
        """Start copying the blocks of `experts` of MoE layer `layer`; never waits.

        Raises:
          LinkError: the device takes no copy.
        """
        self.pool.restore()  # what an insert that failed has taken
        if isinstance(self._wire, DeviceLink):
            self._copies.timeline = self._wire.timeline
        ready = self._wire.beside(layer, experts, self.block_bytes)
        return SmallCopy([(layer, expert) for expert in experts], self._copies.start(layer, experts), ready)

    def finish(self, copy: SmallCopy, slots: Sequence[int]) -> None:
        """Put a started copy into `slots`; programs dispatched afterwards see it.

        Raises:
          LinkError: the wire takes too long, or the device does not take the blocks.
        """
        self._wire.hold(copy.keys, copy.ready)
        spent = self._copies.seconds
        self._copies.finish(copy.blocks, slots)
        self._wire.seconds += self._copies.seconds - spent
