"""What missing experts cost, copied to the device or computed on the host, and which of a layer's to compute."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from ef_jax.choices import chosen

Miss = Literal["fetch", "compute", "auto"]
"""What becomes of a missing expert: it is copied, computed by the host, or what is sooner done."""

_WEIGHT = 1 / 8  # of the newest measurement in the means
_WEIGHT_BELOW = 1 / 2  # of one below its mean: only what gets in the way makes calls differ, and it goes away
_LONGEST = 4.0  # times the mean: what a call counts for that took longer, because something else got in its way
_RETRY = 64  # layers in which nothing was worth computing, until one expert is computed to see whether that still holds


def check_miss(miss: str) -> Miss:
    """`miss`, if there is a way of that name to see to missing experts.

    Raises:
      InputError: there is none.
    """
    return chosen("miss", miss, Miss)


class MissCosts:
    """Running means, and the split of a layer's misses by them.

    The link and the host work side by side, so a layer waits for the longer of the two:
    `max(copied x copy_seconds, overhead + seconds of those computed)`. For the same reason FreeToken (arXiv:2608.16157)
    splits misses by the ratio of two bandwidths, and HybriMoE (arXiv:2504.05897) by simulating both. Where the host is
    also the device, what is copied still has to be taken over and computed by it afterwards, and that is added.

    A call's time depends on its rows by the tiles that hold them.

    Args:
      tile_rows: rows of a tile.
      take_over: seconds that the host spends on each block that is copied, where the host is also the device; None:
        it is not.
    """

    def __init__(self, *, tile_rows: int, take_over: float | None) -> None:
        self._tile_rows, self._take_over = tile_rows, take_over
        self._seconds: dict[int, float] = {}
        self._overhead: float | None = None
        self._first = True
        self._layers = 0
        self._retry_at = _RETRY

    def computed(self, rows: int, seconds: float) -> None:
        """An expert of so many rows was computed in `seconds`."""
        tiles = self._tiles(rows)
        self._seconds[tiles] = _updated(self._seconds.get(tiles), seconds)

    def around(self, seconds: float) -> None:
        """A layer took `seconds` beside those of its experts, to get their inputs and give their outputs back. The
        first is left out: nothing is warm yet."""
        if not self._first:
            self._overhead = _updated(self._overhead, seconds)
        self._first = False

    def seconds(self, rows: int) -> float:
        """How long an expert of so many rows will take; in proportion to what has been measured nearest.

        Nothing has been measured: no time at all.
        """
        tiles = self._tiles(rows)
        nearest = min(self._seconds, key=lambda known: abs(known - tiles), default=None)
        return 0.0 if nearest is None else self._seconds[nearest] * max(1.0, tiles / nearest)

    def split(self, rows: Sequence[int], copy_seconds: float, busy: float = 0.0) -> int:
        """How many of a layer's missing experts to compute, when those of fewest rows are computed first.

        Args:
          rows: of each expert, in ascending order, not empty.
          copy_seconds: link time of a block; 0 where the link does nothing by itself.
          busy: seconds until the link can begin.
        """
        each = [self.seconds(count) for count in rows]
        computed = list(itertools.accumulate(each, initial=0.0))
        every, overhead = len(rows), self._overhead or 0.0

        def wait(count: int) -> float:
            after = 0.0
            if self._take_over is not None:
                after = (every - count) * self._take_over + computed[-1] - computed[count]
            copying = busy + (every - count) * copy_seconds if count < every else 0.0
            return max(copying, computed[count] + (overhead if count else 0.0)) + after

        best = min(range(every + 1), key=wait)
        self._layers += 1
        if best:
            self._retry_at = self._layers + _RETRY
        elif self._layers >= self._retry_at:
            best = 1
            worse = each[0] / copy_seconds if copy_seconds else 1.0
            self._retry_at = self._layers + math.ceil(_RETRY * max(1.0, worse))
        return best

    def report(self) -> dict[str, Any]:
        """The means, as plain JSON types; `compute_seconds` by the most rows that take so long."""
        return {
            "compute_seconds": {
                str(tiles * self._tile_rows): seconds for tiles, seconds in sorted(self._seconds.items())
            },
            "overhead_seconds": self._overhead,
            "take_over_seconds": self._take_over,
        }

    def _tiles(self, rows: int) -> int:
        return -(-rows // self._tile_rows)


def _updated(mean: float | None, seconds: float) -> float:
    if mean is None:
        return seconds
    weight = _WEIGHT_BELOW if seconds < mean else _WEIGHT
    return mean + weight * (min(seconds, _LONGEST * mean) - mean)
