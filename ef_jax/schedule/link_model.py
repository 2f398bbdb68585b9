"""How long copies over a link take."""

import dataclasses
import math

from ef_jax.errors import InputError
from ef_jax.memory.rates import parse_bandwidth, parse_seconds


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LinkModel:
    """How long copies take. One call runs at a time; of n blocks, it takes `latency + n x block_seconds`.

    Attributes:
      bandwidth: bytes a second, one way.
      latency: seconds that a call takes before its first block moves.
      block_overhead: seconds that each block takes besides its bytes.
      in_flight: prefetched blocks a call at most. A call that has begun ends before any other begins, so this is
        what a demand copy may have to wait for.

    Raises:
      InputError: a figure that no link has.
    """

    bandwidth: float
    latency: float = 0.0
    block_overhead: float = 0.0
    in_flight: int = 1

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise InputError(f"bandwidth {self.bandwidth} bytes/s: give more than 0")
        for name in ("latency", "block_overhead"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} s: give 0 or more seconds")
        if self.in_flight < 1:
            raise InputError(f"in_flight {self.in_flight}: give at least 1 block")

    @classmethod
    def parse(cls, text: str) -> "LinkModel":
        """The model of `"25GB/s"` or, with a latency, of `"25GB/s+10us"`.

        Raises:
          InputError: not a bandwidth, or not a duration after the plus sign.
        """
        bandwidth, plus, latency = text.partition("+")
        return cls(bandwidth=parse_bandwidth(bandwidth), latency=parse_seconds(latency) if plus else 0.0)

    def block_seconds(self, nbytes: int) -> float:
        """Seconds that a block of `nbytes` bytes occupies the link, latency left out."""
        return self.block_overhead + nbytes / self.bandwidth
