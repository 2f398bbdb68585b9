"""A link of any speed in wall-clock time: real copies into real slots, each held back until its time has come."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from ef_jax.errors import LinkError
from ef_jax.memory.policies import Key
from ef_jax.memory.slot_pool import SlotPool
from ef_jax.schedule.device_link import TIMEOUT_SECONDS, DeviceLink, link_error
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.link_queue import LinkQueue
from ef_jax.schedule.wall_clock import Clock, WallClock


class Started(NamedTuple):
    """A demand copy: its keys, its blocks, and when they may be in their slots; no blocks while one of them is not in
    host memory."""

    keys: list[Key]
    blocks: list[jax.Array] | None
    ready: float


class EmulatedLink(LinkQueue):
    """A `PrefetchLink` that is as fast as its model says, on any machine whose own link is faster.

    A prefetched block is copied into its slot by the first call of `arrived` or `wait` after its time has come, several
    blocks together. The copy itself is then work of the caller's thread, on CPU about 10 us and the block's bytes at
    memory speed: what is emulated is when copies may end, not that they cost nothing.

    Args:
      link: copies.
      model: the emulated figures; `set_model` changes them in mid-run.
      clock: the time that the model goes by.
      timeout: seconds after which a copy that a layer waits for is given up.

    Attributes:
      seconds: time spent in waiting and in copying.
      prefetches_failed: see `PrefetchLink`.
    """

    def __init__(
        self, link: DeviceLink, model: LinkModel, *, clock: Clock | None = None, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        super().__init__(model, clock or WallClock(), block_bytes=link.block_bytes)
        self.prefetches_failed = 0
        self._link, self._timeout = link, timeout
        self._slot: dict[Key, int] = {}
        self._failed: list[Key] = []

    @property
    def pool(self) -> SlotPool:
        """The slot pool; its array is replaced whenever blocks enter their slots."""
        return self._link.pool

    def start(self, layer: int, experts: Sequence[int]) -> Started:
        """See `Link`.

        Raises:
          LinkError: the device takes no copy.
        """
        keys = [(layer, expert) for expert in experts]
        if not self._link.request(keys):
            return Started(keys, None, 0.0)
        return Started(keys, self._link.fetch(keys), self.demand(layer, experts))

    def finish(self, blocks: Started, slots: Sequence[int]) -> None:
        """See `Link`.

        Raises:
          LinkError: the copy takes longer than the timeout, or the device does not take it, or a block cannot be had.
        """
        if not blocks.keys:
            return
        if blocks.blocks is None:
            began = self.clock.now
            arrays = self._link.fetch(blocks.keys)
            self.seconds += self.clock.now - began
            blocks = Started(blocks.keys, arrays, self.demand(blocks.keys[0][0], [key[1] for key in blocks.keys]))
        self.hold(blocks.keys, blocks.ready)
        self._insert(blocks.blocks or [], slots)

    def hold(self, keys: Sequence[Key], ready: float) -> None:
        """Wait for a demand copy of some keys, or for what `beside` began, which is across at `ready`.

        Raises:
          LinkError: it takes longer than the timeout.
        """
        last = self.clock.now + self._timeout
        self.wait_until(min(ready, last))
        if ready > last:
            raise link_error(keys, f"nothing has come for {self._timeout:g} s")

    def settle(self) -> None:
        """See `Link`."""
        self._link.settle()

    def withdraw(self) -> list[Key]:
        """See `PrefetchLink`."""
        keys = super().withdraw()
        for key in keys:
            del self._slot[key]
        return keys

    def arrived(self) -> list[Key]:
        """See `PrefetchLink`."""
        return self._land(super().arrived())

    def failed(self) -> list[Key]:
        """See `PrefetchLink`."""
        keys, self._failed = self._failed, []
        return keys

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """See `PrefetchLink`."""
        self._slot.update(zip(keys, slots, strict=True))
        self.enqueue(keys)

    def wait(self, keys: Sequence[Key]) -> None:
        """See `PrefetchLink`; what takes longer than the timeout has failed."""
        if not keys:
            return
        last = self.clock.now + self._timeout
        ready = {key: self.take(key) for key in keys}
        self.wait_until(min(max(ready.values()), last))
        self._land([key for key in keys if ready[key] <= last])
        self._fail([key for key in keys if ready[key] > last])

    def abandon(self) -> None:
        """See `PrefetchLink`."""
        super().abandon()
        self._slot.clear()
        self._failed.clear()

    def _land(self, keys: list[Key]) -> list[Key]:
        """Copy prefetched blocks into their slots; returns the keys of those that went well."""
        if not keys:
            return keys
        self._link.request(keys)
        try:
            blocks = self._link.fetch(keys)
        except LinkError:
            if len(keys) > 1:  # which of them?
                return [landed for key in keys for landed in self._land([key])]
            self._fail(keys)
            return []
        self._insert(blocks, [self._slot.pop(key) for key in keys])
        return keys

    def _insert(self, blocks: Sequence[jax.Array], slots: Sequence[int]) -> None:
        began = self.clock.now
        self._link.finish(blocks, slots)
        now = self.clock.now
        self.seconds += now - began
        self._meter.waited(now)

    def _fail(self, keys: Sequence[Key]) -> None:
        for key in keys:
            del self._slot[key]
        self._failed += keys
        self.prefetches_failed += len(keys)
