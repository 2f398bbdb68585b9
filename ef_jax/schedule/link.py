"""What the scheduler asks of a link: copies of whole blocks from the host store into slots."""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from ef_jax.memory.policies import Key
from ef_jax.schedule.pace import LinkPace
from ef_jax.timeline import Timeline

Blocks = TypeVar("Blocks")


@runtime_checkable
class Link(Protocol[Blocks]):
    """Copies blocks that a step asks for. `Blocks` is what a started copy is known by.

    A demand copy that fails, or that has not come within the link's timeout, raises `LinkError`.

    Attributes:
      bytes_moved: bytes asked to cross since construction.
      seconds: time that callers have spent in the link's methods.
      timeline: hears of every copy whose begin and end are known, if it is not None.
    """

    bytes_moved: int
    seconds: float
    timeline: Timeline | None

    def start(self, layer: int, experts: Sequence[int]) -> Blocks:
        """Start copying the blocks of `experts` of MoE layer `layer`; never waits for them."""
        ...

    def finish(self, blocks: Blocks, slots: Sequence[int]) -> None:
        """Put started blocks into `slots`; what is computed afterwards sees them."""
        ...

    def settle(self) -> None:
        """Wait, where copies hold memory of their own, until every block handed to `finish` is in its slot."""
        ...


@runtime_checkable
class PrefetchLink(Link[Blocks], Protocol[Blocks]):
    """A link that also copies blocks on predictions, whenever no demand copy wants it.

    A prefetch waits in the link's queue until the link is free, and can be withdrawn until its copy has begun. A copy
    that has begun goes on to its end; only few begin at a time, so that a demand copy is soon served. One that fails
    raises nothing: its key is told by `failed`, once, and can be copied on demand.

    A layer of a decode step calls `withdraw` first and `prefetch` last, with nothing to fetch if need be: the time in
    between layers is measured by these two.

    Attributes:
      prefetches_begun: blocks whose prefetch has begun since construction.
      prefetches_failed: of those, how many have failed.
    """

    prefetches_begun: int
    prefetches_failed: int

    @property
    def pace(self) -> LinkPace:
        """How fast the link and the layers have been of late."""
        ...

    def withdraw(self) -> list[Key]:
        """Take back the prefetches that have not begun."""
        ...

    def arrived(self) -> list[Key]:
        """Keys of the prefetched blocks that have come into their slots since the last call."""
        ...

    def failed(self) -> list[Key]:
        """Keys of the prefetches that have failed since the last call, those that were waited for among them. Nothing
        will be written into their slots; `arrived` and `wait` find out."""
        ...

    def window(self) -> int:
        """Prefetches that the link can begin before the next layer asks, by what has been measured so far; asked with
        nothing in the queue and the demand copies of this layer started."""
        ...

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """Queue a copy of each key's block into its slot, the most urgent first; never waits."""
        ...

    def wait(self, keys: Sequence[Key]) -> None:
        """Wait for prefetches that have begun until they are in their slots, or have failed; `arrived` does not tell
        of them again."""
        ...

    def abandon(self) -> None:
        """Forget every prefetch, without waiting: nothing of them will be written, nothing will be told of them. For
        after an error, when it is no longer certain what is where."""
        ...
