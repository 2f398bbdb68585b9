"""MXFP4 weights as gpt-oss ships them, and as our blocks hold them: the same 4-bit codes in other places.

Shipped, a byte holds two neighbours of a row, the even column in its low half. In a block it holds column d and column
d + D/2 of a row, and the down projection is transposed. Both ways are exact. A core packs about 1.3 GB/s, and other
threads run meanwhile.
"""

from typing import Literal

import numpy as np

_CHUNK_BYTES = 128 << 10

Codes = Literal["rows", "columns"]


def pack(codes: Codes, shipped: np.ndarray, packed: np.ndarray) -> None:
    """`pack_rows` or `pack_columns`."""
    (pack_rows if codes == "rows" else pack_columns)(shipped, packed)


def unpack(codes: Codes, packed: np.ndarray, shipped: np.ndarray) -> None:
    """The inverse of `pack`."""
    (unpack_rows if codes == "rows" else unpack_columns)(packed, shipped)


def pack_rows(shipped: np.ndarray, packed: np.ndarray) -> None:
    """Rows that a block has too: `shipped` `[..., D/2]` to `packed` `[..., D/2]`, both uint8."""
    half = shipped.shape[-1] // 2
    _exchange(shipped[..., :half], shipped[..., half:], packed[..., 0::2], packed[..., 1::2])


def unpack_rows(packed: np.ndarray, shipped: np.ndarray) -> None:
    """The inverse of `pack_rows`."""
    half = shipped.shape[-1] // 2
    _exchange(packed[..., 0::2], packed[..., 1::2], shipped[..., :half], shipped[..., half:])


def pack_columns(shipped: np.ndarray, packed: np.ndarray) -> None:
    """Rows that are columns of a block: `shipped` `[D, F/2]` to `packed` `[F, D/2]`, both uint8."""
    half = len(shipped) // 2
    _exchange(shipped[:half], shipped[half:], packed[0::2].T, packed[1::2].T)


def unpack_columns(packed: np.ndarray, shipped: np.ndarray) -> None:
    """The inverse of `pack_columns`."""
    half = len(shipped) // 2
    _exchange(packed[0::2].T, packed[1::2].T, shipped[:half], shipped[half:])


def _exchange(a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """The low halves of the bytes of `a` and `b` together to `low`, their high halves to `high`: its own inverse."""
    rows = max(1, _CHUNK_BYTES // max(1, a[0].size))
    for first in range(0, len(a), rows):
        chunk = slice(first, first + rows)
        left, right = a[chunk], b[chunk]
        low[chunk] = (left & 15) | (right << 4)
        high[chunk] = (left >> 4) | (right & 0xF0)
