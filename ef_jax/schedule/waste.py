"""A bound on the share of the bytes moved that is fetched and never used."""

from typing import Any

from ef_jax.errors import InputError

_MEMORY = 16  # steps that the share reaches back
_RATE = 0.05  # by which the price follows the share, a step
_FIRST, _HIGHEST = 0.2, 1.0


class WasteBound:
    """The price of a wasted copy that keeps the wasted share of the bytes moved at a bound.

    A link that would be idle otherwise makes wasted copies free, and the fewest stalls waste up to half of what is
    moved. Where the bytes have a price of their own (a link that others use, energy), a copy has to save more than
    `price` blocks of stall for each chance of one that it is wasted. Each copy is judged by that price, so what is
    given up for a bound are the copies that save least for what they waste. The price rises while the measured share is
    above the bound and falls while it is below; the gain is the same for all traces.

    Args:
      most: share of the blocks moved, on demand and ahead, that may leave their slots unused; 1: no bound.

    Attributes:
      price: of a wasted copy, in blocks of stall.

    Raises:
      InputError: `most` is no share.
    """

    def __init__(self, most: float) -> None:
        check_most_wasted(most)
        self._most = most
        self.price = 0.0 if most == 1 else _FIRST
        self._moved = self._wasted = 0.0

    def end_step(self, moved: int, wasted: int) -> None:
        """A step has moved so many blocks, and so many that had been prefetched have left unused."""
        self._moved += (moved - self._moved) / _MEMORY
        self._wasted += (wasted - self._wasted) / _MEMORY
        if self._most < 1 and self._moved:
            self.price = min(max(self.price + _RATE * (self.share - self._most), 0.0), _HIGHEST)

    @property
    def share(self) -> float:
        """Of the blocks moved lately, those wasted."""
        return self._wasted / self._moved if self._moved else 0.0

    def report(self) -> dict[str, Any]:
        """Bound, share and price, as plain JSON types."""
        return {"most": self._most, "share": round(self.share, 4), "price": round(self.price, 4)}


def check_most_wasted(most: float) -> None:
    """Refuse what is no share.

    Raises:
      InputError: `most` is not from 0 to 1.
    """
    if not 0 <= most <= 1:
        raise InputError(f"most_wasted {most}: give a share of the bytes moved from 0 to 1, where 1 is no bound")
