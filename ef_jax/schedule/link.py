"""What the scheduler asks of a link: copies of whole blocks from the host store into slots."""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

Blocks = TypeVar("Blocks")


@runtime_checkable
class Link(Protocol[Blocks]):
    """Copies blocks that a step asks for. `Blocks` is what a started copy is known by.

    Attributes:
      bytes_moved: bytes asked to cross since construction.
      seconds: time that the caller of `start` and `finish` has spent in them.
    """

    bytes_moved: int
    seconds: float

    def start(self, layer: int, experts: Sequence[int]) -> Blocks:
        """Start copying the blocks of `experts` of MoE layer `layer`; never waits for them."""
        ...

    def finish(self, blocks: Blocks, slots: Sequence[int]) -> None:
        """Put started blocks into `slots`; what is computed afterwards sees them."""
        ...

    def settle(self) -> None:
        """Wait, where copies hold memory of their own, until every block handed to `finish` is in its slot."""
        ...
