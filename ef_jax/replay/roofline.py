"""How long a device computes for a layer: a roofline, for replays whose passes are of any width."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64, Int64

from ef_jax.errors import InputError

_ITEM_BYTES = 2  # of bfloat16 weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A layer takes `dispatch` and the longer of reading its weights and caches and of its matrix products.

    S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009.
    Weights are of 16 bits. The products of attention with its caches are left out: they are 1 % of a layer's at 1,000
    positions of DeepSeek-V2-Lite.

    Attributes:
      flops: operations a second that matrix products reach.
      bandwidth: bytes a second that are read from device memory.
      dispatch: seconds that a layer takes whatever it does.
      dense_bytes: of a layer's attention, router and shared experts, mean of all MoE layers.
      block_bytes: of one expert.
      cache_bytes: of one position's keys and values in one layer.
      top_k: experts of a token.

    Raises:
      InputError: a figure that no device has.
    """

    flops: float
    bandwidth: float
    dispatch: float
    dense_bytes: int
    block_bytes: int
    cache_bytes: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} a second: give more than 0")
        if not 0 <= self.dispatch < math.inf:
            raise InputError(f"dispatch {self.dispatch} s: give 0 or more seconds")
        for name in ("dense_bytes", "block_bytes", "cache_bytes", "top_k"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}: give 0 or more")

    def layer_seconds(
        self, *, tokens: int, positions: int, experts: Int64[np.ndarray, "L"]
    ) -> Float64[np.ndarray, "L"]:
        """Seconds of each layer of a pass.

        Args:
          tokens: that it takes in.
          positions: of the caches that it reads, over all its sequences.
          experts: distinct ones that each layer uses.
        """
        read = self.dense_bytes + self.cache_bytes * positions + self.block_bytes * experts.astype(np.float64)
        weights = (self.dense_bytes + self.top_k * self.block_bytes) / _ITEM_BYTES
        return self.dispatch + np.maximum(read / self.bandwidth, 2 * weights * tokens / self.flops)
