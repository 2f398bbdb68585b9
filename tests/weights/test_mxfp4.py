"""Shipped MXFP4 weights in a block's order, by the meaning of both, and back byte for byte."""

import numpy as np
import pytest

from ef_jax.weights.mxfp4 import pack_columns, pack_rows, unpack_columns, unpack_rows


def codes_of_pairs(stored: np.ndarray) -> np.ndarray:
    """4-bit codes of bytes that hold neighbours, the even column low."""
    return np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:-1], -1)


def codes_of_halves(stored: np.ndarray) -> np.ndarray:
    """4-bit codes of bytes that hold columns d and d + D/2."""
    return np.concatenate([stored & 15, stored >> 4], -1)


@pytest.mark.parametrize("shape", [(6, 2, 32), (7, 64), (1, 2)], ids=str)
def test_rows(shape: tuple[int, ...]) -> None:
    shipped = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    packed, back = np.empty_like(shipped), np.empty_like(shipped)
    pack_rows(shipped, packed)
    np.testing.assert_array_equal(codes_of_halves(packed), codes_of_pairs(shipped))
    unpack_rows(packed, back)
    np.testing.assert_array_equal(back, shipped)


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (640, 1088), (2, 2)])
def test_columns(hidden: int, width: int) -> None:
    shipped = np.random.default_rng(1).integers(0, 256, (hidden, width // 2), dtype=np.uint8)
    packed, back = np.empty((width, hidden // 2), np.uint8), np.empty_like(shipped)
    pack_columns(shipped, packed)
    np.testing.assert_array_equal(codes_of_halves(packed), codes_of_pairs(shipped).T)
    unpack_columns(packed, back)
    np.testing.assert_array_equal(back, shipped)
