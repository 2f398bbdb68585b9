"""The link one level down: from the files of a checkpoint into the places of a host pool."""

import math
from collections.abc import Sequence

import jax

from ef_jax.errors import LinkError
from ef_jax.memory.host_plan import THREADS, HostPlan
from ef_jax.memory.policies import Key
from ef_jax.memory.read_buffers import ReadBuffers
from ef_jax.schedule.device_link import TIMEOUT_SECONDS
from ef_jax.schedule.pace import LinkPace, PaceMeter
from ef_jax.schedule.read_queue import Read, ReadQueue
from ef_jax.schedule.wall_clock import WallClock
from ef_jax.spec import ModelSpec
from ef_jax.timeline import DISK, Timeline
from ef_jax.weights.block_reader import BlockReader
from pallas_kernels import storage_dtype

_FIRST_GUESS = 1e9  # bytes a second, until reads have been measured


class DiskLink:
    """A `PrefetchLink` whose slots are places in host memory.

    Reads that are waited for begin before all others; those ahead of need wait in a queue until a thread is free, and
    can be withdrawn until then.

    Args:
      spec: the model.
      reader: reads blocks.
      device: whose pinned host memory they are for.
      plan: how many blocks the pool holds, and how many exist besides.
      timeout: seconds after which a read that is waited for is given up.

    Attributes:
      places: the block in each place; None where there is none, or not yet.
      bytes_moved, prefetches_begun, prefetches_failed, seconds, timeline: see `PrefetchLink`; what may still be
        withdrawn counts as begun.
      buffers: what blocks are read into.
    """

    def __init__(
        self,
        spec: ModelSpec,
        reader: BlockReader,
        device: jax.Device,
        *,
        plan: HostPlan,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.places: list[jax.Array | None] = [None] * plan.places
        self.bytes_moved = self.prefetches_begun = self.prefetches_failed = 0
        self.seconds = 0.0
        self.timeline: Timeline | None = None
        self._clock, self._timeout = WallClock(), timeout
        self._block_bytes = spec.block_bytes
        self._flight: dict[Key, tuple[Read, int]] = {}
        self._failed: list[Key] = []
        self._meter = PaceMeter(spec.block_bytes / _FIRST_GUESS)
        # Memory that JAX takes over is the pool itself; what it copies into memory of its own is free at once.
        count = plan.places + plan.on_their_way if device.platform == "cpu" else THREADS
        self.buffers = ReadBuffers(count, reader.buffer_bytes)
        self._queue = ReadQueue(_Placer(spec, reader, device, self.buffers), threads=THREADS)

    @property
    def busy_seconds(self) -> float:
        """Seconds since construction in which any read was under way."""
        return self._queue.busy_seconds

    @property
    def pace(self) -> LinkPace:
        """See `PrefetchLink`: a block's time is that of all reads under way together, over their number."""
        ended, seconds = self._queue.busy()
        if ended:
            self._meter.copied(ended, seconds)
        return self._meter.pace

    def start(self, layer: int, experts: Sequence[int]) -> list[Read]:
        """See `Link`."""
        self.bytes_moved += len(experts) * self._block_bytes
        self._meter.demand(len(experts) * self._meter.block_seconds)
        return self._queue.demand([(layer, expert) for expert in experts])

    def finish(self, blocks: Sequence[Read], slots: Sequence[int]) -> None:
        """See `Link`; a slot below 0 is none.

        Raises:
          LinkError: a block cannot be read, or has not come within the timeout.
        """
        for read, slot in zip(blocks, slots, strict=True):
            block = self.take(read)
            if slot >= 0:
                self.places[slot] = block

    def settle(self) -> None:
        """See `Link`."""

    def take(self, read: Read) -> jax.Array:
        """The block of a read, waiting for it.

        Raises:
          LinkError: as for `finish`.
        """
        if not read.done:
            began = self._clock.now
            come = self._queue.wait(read, self._timeout)
            now = self._clock.now
            self.seconds += now - began
            self._meter.waited(now)
            if not come:
                raise disk_error(read.key, f"nothing has come for {self._timeout:g} s")
        if read.block is None:
            raise disk_error(read.key, str(read.error)) from read.error
        if self.timeline is not None:
            layer, expert = read.key
            self.timeline.span(DISK, f"{layer}/{expert}", read.began, read.ended, layer=layer, expert=expert)
        return read.block

    def vacate(self, slots: Sequence[int]) -> None:
        """What these places held is not needed any more."""
        for slot in slots:
            self.places[slot] = None

    def withdraw(self) -> list[Key]:
        """See `PrefetchLink`."""
        self._meter.begin_layer(self._clock.now)
        keys = [read.key for read in self._queue.withdraw()]
        for key in keys:
            del self._flight[key]
        self._asked_ahead(-len(keys))
        return keys

    def arrived(self) -> list[Key]:
        """See `PrefetchLink`."""
        return [key for key, (read, _) in list(self._flight.items()) if read.done and self._land(key)]

    def failed(self) -> list[Key]:
        """See `PrefetchLink`."""
        keys, self._failed = self._failed, []
        return keys

    def window(self) -> int:
        """See `PrefetchLink`."""
        ahead = sum(not read.done for read, _ in self._flight.values())
        layer, block = self._meter.layer_seconds, self._meter.block_seconds
        return max(0, min(2 * THREADS - ahead, math.ceil(layer / block) - ahead))

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """See `PrefetchLink`."""
        if keys:
            self.vacate(slots)
            self._asked_ahead(len(keys))
            for read, slot in zip(self._queue.ahead(keys), slots, strict=True):
                self._flight[read.key] = read, slot
        self._meter.end_layer(self._clock.now)

    def urge(self, keys: Sequence[Key]) -> None:
        """Somebody waits for these blocks, which were asked for ahead of need."""
        self._queue.urge([self._flight[key][0] for key in keys if key in self._flight])

    def wait(self, keys: Sequence[Key]) -> None:
        """See `PrefetchLink`; what takes longer than the timeout has failed."""
        self.urge(keys)
        for key in keys:
            if key in self._flight:
                self._land(key)

    def abandon(self) -> None:
        """See `PrefetchLink`."""
        self._asked_ahead(-len(self._queue.withdraw()))
        self._flight.clear()
        self._failed.clear()

    def _asked_ahead(self, count: int) -> None:
        """So many more reads ahead of need; those that are withdrawn have not been asked for."""
        self.prefetches_begun += count
        self.bytes_moved += count * self._block_bytes

    def _land(self, key: Key) -> bool:
        """Put the block of a read ahead of need into its place, waiting for it; whether that went well."""
        read, slot = self._flight.pop(key)
        try:
            self.places[slot] = self.take(read)
        except LinkError:
            self._failed.append(key)
            self.prefetches_failed += 1
            return False
        return True


class _Placer:
    """Reads a block into pinned host memory, from any thread."""

    def __init__(self, spec: ModelSpec, reader: BlockReader, device: jax.Device, buffers: ReadBuffers) -> None:
        self._layers, self._reader, self._buffers = spec.moe_layers, reader, buffers
        self._form = spec.block_format
        self._sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def __call__(self, key: Key) -> jax.Array:
        layer, expert = key
        block = self._reader.read(self._layers[layer], expert, self._buffers.take())
        block = block.view(storage_dtype(self._form.dtype)).reshape(self._form.shape)
        return jax.block_until_ready(jax.device_put(block, self._sharding))


def disk_error(key: Key, why: str) -> LinkError:
    """The error that says that a block cannot be had from disk."""
    first = (why.splitlines() or [""])[0]
    return LinkError(f"expert {key[1]} of MoE layer {key[0]} cannot be read: {first}")
