"""A host pool that holds part of the experts and reads the others from disk: residency and prefetching, one level down.

A link asks it for blocks as it asks a `HostStore`. Places in host memory are managed as slots are on the device, by a
`Residency` with a policy of its own, and filled ahead of need by a `Prefetcher` over a `DiskLink`. Two things differ.
What the host needs is what the device lacks: a prediction counts for nothing where the device has the block, so such
blocks also leave first. And the horizon follows from how slow a disk is, so it reaches further than that of the link.

A prompt reads most experts of a layer, each once. Reads go on in the order of its waves, a bounded number ahead of the
wave that computes. What finds a free place stays, as on the device, and nothing leaves for a prompt.
"""

from collections import deque
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from ef_jax.errors import LinkError
from ef_jax.memory.policies import Key
from ef_jax.memory.residency import Admission, Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.disk_link import DiskLink
from ef_jax.schedule.prefetch import Prefetcher
from ef_jax.schedule.read_queue import Read
from ef_jax.stats import DiskStats
from ef_jax.timeline import Timeline

LONGEST = 16
"""No read is further ahead, in layers; a link fetches 8 ahead at most."""

MOST_WASTED = 0.25
"""Of what is read, the share that may be in vain. A read is not as free as a copy over an idle link: it is compared
with a checksum, by cores that also compute. With three quarters in vain a step of `bench.disk` takes 1.3 times as long
as without reading ahead."""

_Reads = list[Read]


class HostTier:
    """Blocks that host memory holds, and those that come from disk.

    A demand is `request` and then `block` for each key. A layer of a step begins with `gate` and ends with `plan`.

    Args:
      disk: fills the places.
      residency: the table of the places.
      block_bytes: bytes of one block.
      passing: reads of a prompt that go on ahead of its waves, at most.

    Attributes:
      block_bytes: bytes of one block.
      nbytes: bytes of all places.
      residency, disk: as given.
      stats: counters to add to.
    """

    def __init__(self, disk: DiskLink, residency: Residency, *, block_bytes: int, passing: int) -> None:
        self.disk, self.residency = disk, residency
        self.block_bytes = block_bytes
        self.nbytes = residency.cache_slots * block_bytes
        self.stats = DiskStats(places=residency.cache_slots)
        self._passing = passing
        self._prefetcher: Prefetcher[_Reads] | None = None
        self._coming: dict[Key, tuple[Read, int]] = {}  # demanded, and the place that it is for; -1: none
        self._prompt: deque[Key] = deque()  # what its waves will ask for
        self._in_prompt = False
        self._asked = Admission(0, [], [], [], [])
        self._needed: list[int] = []
        self._ahead = self._wasted = 0
        self._busy = 0.0

    def listen(self, predictor: Predictor, device: Residency, *, most_wasted: float = 1.0) -> None:
        """Read ahead what `predictor` says will be used and what the slots of `device` do not have; of the blocks read,
        `most_wasted` at most in vain, and never more than `MOST_WASTED`, see `WasteBound`."""
        self._prefetcher = Prefetcher(
            self.residency,
            self.disk,
            predictor,
            horizon=None,
            longest=LONGEST,
            most_wasted=min(most_wasted, MOST_WASTED),
            among=lambda: device.slot_of < 0,
        )

    def show(self, timeline: Timeline | None) -> None:
        """Note reads in `timeline` from now on; None: nowhere."""
        self.disk.timeline = timeline

    def request(self, keys: Sequence[Key]) -> bool:
        """Have blocks read that are not here; whether all are here. Never waits."""
        while any(key in self._prompt for key in keys):
            self._begin_next()
        absent = [key for key in keys if key not in self._coming]
        if self._in_prompt:  # whose uses the policy hears of when it has ended
            self.stats.hits += sum(self._place(key) is not None for key in absent)
            absent = [key for key in absent if self._place(key) is None]
        for layer in dict.fromkeys(layer for layer, _ in absent):
            self._admit(layer, [expert for of, expert in absent if of == layer])
        return not any(key in self._coming or self._place(key) is None for key in keys)

    def block(self, layer: int, expert: int) -> jax.Array:
        """The block of an expert of MoE layer `layer`, waiting for it if need be.

        Raises:
          LinkError: it cannot be read, or has not come in time.
        """
        key = layer, expert
        if key not in self._coming and self._place(key) is None and key not in self.residency.in_flight:
            self.request([key])
        spent = self.disk.seconds
        try:
            block = self._come(key)
        finally:
            self.stats.stall_seconds += self.disk.seconds - spent
        return block

    def begin_step(self, tokens: Sequence[int], diversity: float | None, *, listens: bool) -> None:
        """A decode step begins; `tokens` as for `Policy.on_step`."""
        self._in_prompt = False
        self.residency.policy.on_step(tokens)
        if self._prefetcher is not None and listens:
            self._prefetcher.begin_step(len(tokens), diversity)

    def gate(self) -> None:
        """A layer is about to ask: what was to be read ahead and has not begun is withdrawn, what has come is here."""
        if self._prefetcher is not None:
            self._prefetcher.gate()
        self._asked, self._needed = Admission(0, [], [], [], []), []
        self._count()

    def plan(self, layer: int) -> None:
        """A layer has asked for all that it needs: read ahead for those after it. -1: before layer 0.

        Raises:
          PredictorError: the predictor's scores are no numbers.
        """
        if self._prefetcher is not None:
            if layer >= 0:
                self._prefetcher.served(layer, self._needed, self._asked)
            self._prefetcher.plan(layer, self._needed)

    def prompt(self, layer: int, experts: Sequence[int]) -> None:
        """The waves of a prompt will ask for `experts` of a layer, in this order."""
        self.gate()
        self._in_prompt = True
        row, in_flight = self.residency.slot_of[layer], set(self.residency.in_flight)
        missing = [expert for expert in experts if row[expert] < 0 and (layer, expert) not in in_flight]
        self.residency.seed(layer, missing)
        self._prompt.extend((layer, expert) for expert in missing)
        self.stats.misses += len(missing)
        self._go_on()

    def end_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        """All waves of a layer have been asked for; `counts` as for `Policy.on_prompt`."""
        self.residency.policy.on_prompt(layer, counts)

    def abandon(self) -> None:
        """Forget what is on its way, after an error: it was not certain to come."""
        self._end_prompt()
        for key in list(self._coming):
            self._lose(key)
        self.disk.abandon()
        for key in self.residency.in_flight:
            self.residency.cancel(*key)

    def end_run(self) -> None:
        """Nothing follows for now. `stats` gets the report of the run."""
        self.gate()
        self.stats.buffers_made = self.disk.buffers.made
        self.stats.horizon = None if self._prefetcher is None else self._prefetcher.report()

    def _admit(self, layer: int, experts: list[int]) -> None:
        """Make places for blocks that are asked for, and have those read that are not here."""
        admission = self.residency.admit(layer, [experts])
        stats = self.stats
        stats.hits += admission.hits
        stats.late_hits += len(admission.late)
        stats.misses += len(admission.missing)
        self._needed = [*self._needed, *experts]
        asked = self._asked
        self._asked = Admission(
            asked.hits + admission.hits,
            [*asked.late, *admission.late],
            [*asked.missing, *admission.missing],
            [],
            [],
            asked.foreseen + admission.foreseen,
        )
        self.disk.urge([(layer, expert) for expert in admission.late])
        self._read(layer, admission.missing, admission.missing_slots)

    def _read(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> None:
        places = [slot if slot < self.residency.cache_slots else -1 for slot in slots]
        self.disk.vacate([place for place in places if place >= 0])
        for read, place in zip(self.disk.start(layer, experts), places, strict=True):
            self._coming[read.key] = read, place
        self.stats.bytes_read += len(experts) * self.block_bytes

    def _come(self, key: Key) -> jax.Array:
        """The block of a key that is here or on its way."""
        if key in self._coming:
            return self._take(key)
        if self._place(key) is None:
            self._land(key)
        block = self._take(key) if key in self._coming else self._place(key)
        assert block is not None
        return block

    def _take(self, key: Key) -> jax.Array:
        """The block of a demanded key."""
        read, place = self._coming[key]
        try:
            block = self.disk.take(read)
        except LinkError:
            self._lose(key)
            raise
        del self._coming[key]
        if place >= 0 and self.residency.slot_of[key] == place:
            self.disk.places[place] = block
        self._go_on()
        return block

    def _land(self, key: Key) -> None:
        """Wait for a block that was read ahead of need; if that has failed, it is read on demand."""
        layer, expert = key
        assert self._prefetcher is not None
        if self._prefetcher.wait(layer, [expert]):
            slot = self.residency.waiting(layer, [expert])
            self.residency.arrive(layer, expert, used=True)
            self._read(layer, [expert], slot)

    def _lose(self, key: Key) -> None:
        """A demanded block does not come."""
        _, place = self._coming.pop(key)
        if place >= 0 and self.residency.slot_of[key] == place:
            self._drop(key)

    def _place(self, key: Key) -> jax.Array | None:
        """The block of a key that is in its place."""
        slot = self.residency.slot_of[key]
        return self.disk.places[slot] if slot >= 0 else None

    def _drop(self, key: Key) -> None:
        """A key has no place any more."""
        self.disk.vacate([int(self.residency.slot_of[key])])
        self.residency.drop(*key)

    def _go_on(self) -> None:
        """Begin as many reads of a prompt as may be ahead of its waves."""
        while self._prompt and len(self._coming) < self._passing:
            self._begin_next()

    def _begin_next(self) -> None:
        """Begin the next read of a prompt."""
        layer, expert = self._prompt.popleft()
        self._read(layer, [expert], [int(self.residency.slot_of[layer, expert])])

    def _end_prompt(self) -> None:
        """No wave will ask for what is left of a prompt that has broken off."""
        while self._prompt:
            key = self._prompt.popleft()
            if self.residency.slot_of[key] >= 0:
                self._drop(key)

    def _count(self) -> None:
        """Reads ahead that have begun, and those that were in vain, since this was last done."""
        ahead, wasted = self.disk.prefetches_begun, sum(self.residency.wasted)
        self.stats.bytes_ahead += (ahead - self._ahead) * self.block_bytes
        self.stats.bytes_wasted += (wasted - self._wasted) * self.block_bytes
        self._ahead, self._wasted = ahead, wasted
        busy = self.disk.busy_seconds
        self.stats.read_seconds += busy - self._busy
        self._busy = busy
