"""What is static about a call: what backends accept or refuse by, and tile configurations are found by."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pallas_kernels.grouped_ffn.quantized import Format
from pallas_kernels.grouped_ffn.target import Target

Storage = Literal["dense"] | Format

TILE_ROWS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, dtypes and names of one call.

    Attributes:
      rows, groups, slots: M, G, S.
      contract: size that the first matmul sums over: D for a feed-forward network.
      width: columns that the first matmul gives: F for a feed-forward network.
      dtype: of the rows.
      storage: "dense", or the format of a `QuantizedPool`.
      activation: a key of `ACTIVATIONS`; None for a plain matmul.
      gated: whether blocks are gate, up and transposed down, else up and transposed down.
      biased: whether the experts have biases.
      tile_rows: fixed height of a tile. A row's result depends on it, not on M.
      target: what to build for.
    """

    rows: int
    groups: int
    slots: int
    contract: int
    width: int
    dtype: np.dtype
    storage: Storage = "dense"
    activation: str | None = None
    gated: bool = True
    biased: bool = False
    tile_rows: int = 8
    target: Target

    @property
    def down_part(self) -> int:
        """Of a block; those before it are projections to F."""
        return 2 if self.gated else 1

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.groups} groups, {self.contract} x {self.width}, {self.dtype} with {self.storage} "
            f"weights on {self.target.device_kind}"
        )


def fitting_tile_rows(rows: int, groups: int) -> int:
    """Height of tile for groups of about rows / groups rows: the least of `TILE_ROWS` that holds them, at most 128."""
    each = -(-rows // max(groups, 1))
    return next((height for height in TILE_ROWS if height >= each), TILE_ROWS[-1])
