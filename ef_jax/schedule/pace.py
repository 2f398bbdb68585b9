"""How fast a link and the layers are, as seen while serving."""

from typing import NamedTuple

_LAYER_WEIGHT = 1 / 8  # of the newest layer in the means: half of the past is forgotten in five layers
_BLOCK_WEIGHT = 1 / 8  # likewise, of each block that has crossed
_LONGEST_LAYER = 4.0  # times the mean: what a layer counts for that took longer, because something else got in its way


class LinkPace(NamedTuple):
    """What has been measured so far.

    Attributes:
      block_seconds: link time of one block, one way, latencies of calls included.
      layer_seconds: from the end of one layer's serving to the beginning of the next's, in which copies can hide.
      idle_share: share of the time in which no demand copy was under way, 0 to 1.
    """

    block_seconds: float
    layer_seconds: float
    idle_share: float


class PaceMeter:
    """Moving averages of a link's pace.

    A layer begins when it is about to ask, and ends when the link has been told everything and waited for. What lies
    between a layer's end and the next one's beginning is the time of computing; where a beginning follows another
    without an end (prompts), nothing is taken.

    Args:
      block_seconds: what a probe has found. A layer's time counts as one block's before any is seen.

    Attributes:
      block_seconds, layer_seconds: see `LinkPace`.
    """

    def __init__(self, block_seconds: float) -> None:
        self.block_seconds = self.layer_seconds = block_seconds
        self._began = self._demand = 0.0
        self._mean_demand, self._mean_period = 0.0, 0.0
        self._ended: float | None = None

    @property
    def pace(self) -> LinkPace:
        """The averages."""
        busy = self._mean_demand / self._mean_period if self._mean_period else 0.0
        return LinkPace(self.block_seconds, self.layer_seconds, max(0.0, 1.0 - busy))

    def copied(self, blocks: float, seconds: float) -> None:
        """`blocks` blocks, or smaller copies of so many blocks' bytes, have taken `seconds` of link time."""
        keep = (1 - _BLOCK_WEIGHT) ** blocks
        self.block_seconds += (1 - keep) * (seconds / blocks - self.block_seconds)

    def demand(self, seconds: float) -> None:
        """A demand copy takes `seconds` of link time."""
        self._demand += seconds

    def begin_layer(self, now: float, served_at: float = 0.0) -> None:
        """A layer is about to ask. Where nobody waited for what the last one needed, that came at `served_at`."""
        if self._ended is not None:
            computing, mean = max(0.0, now - max(self._ended, served_at)), self.layer_seconds
            if mean:
                computing = min(computing, max(_LONGEST_LAYER * mean, self.block_seconds))
            self.layer_seconds += _LAYER_WEIGHT * (computing - mean)
            self._mean_demand += _LAYER_WEIGHT * (self._demand - self._mean_demand)
            self._mean_period += _LAYER_WEIGHT * (now - self._began - self._mean_period)
            self._ended = None
        self._began, self._demand = now, 0.0

    def end_layer(self, now: float) -> None:
        """The layer has all that it was waiting for, so far."""
        self._ended = now

    def waited(self, now: float) -> None:
        """Somebody has waited until `now`: if that was for the layer that had ended, it ends now."""
        if self._ended is not None:
            self._ended = now
