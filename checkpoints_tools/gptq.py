"""Rounds a matrix so that its products with given inputs change least: GPTQ (Frantar et al., arXiv 2210.17323).

Row after row is rounded, and what that changes of the outputs is made up for by the rows that are left. qwix 0.1.8 has
the same (`qwix.contrib.gptq_core`), but as a loop of single operations, each compiled for its own shape: on a CPU 220 s
for a first matrix of 128 x 192 and 1.1 s for each further one, so days for a model.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int8

from ef_jax.weights.quantize import LARGEST, IntFormat, as_float32

_BLOCK = 128
_DAMPING = 0.01


def gptq(
    weights: Float32[np.ndarray, "inputs outputs"],
    products: Float64[np.ndarray, "inputs inputs"],
    scales: Float[np.ndarray, "groups outputs"],
    format: IntFormat,
) -> Int8[np.ndarray, "inputs outputs"]:
    """Whole numbers whose products with their groups' scales stand for the weights.

    Args:
      weights: of a product `x @ weights`; overwritten.
      products: `x.T @ x` of what the matrix reads. Where there is none, zeros: then weights are rounded to nearest.
      scales: filled, in their own dtype: from the largest magnitude of each group once its turn has come. Groups are
        runs of inputs, all of one size.
      format: of the whole numbers.
    """
    inputs, most = len(weights), LARGEST[format]
    group = inputs // len(scales)
    block = _BLOCK if group > _BLOCK else _BLOCK // group * group
    factor = _factor(products)
    codes = np.empty(weights.shape, np.int8)
    for start in range(0, inputs, block):
        rows = slice(start, min(start + block, inputs))
        errors = np.empty_like(weights[rows])
        for row in range(start, rows.stop):
            if row % group == 0:
                scale = scales[row // group]
                scale[...] = np.abs(weights[row : row + group]).max(axis=0) / np.float32(most)
                divisor = as_float32(scale)
                divisor[divisor == 0] = 1
            codes[row] = code = np.clip(np.rint(weights[row] / divisor), -most, most)
            errors[row - start] = error = (weights[row] - code * divisor) / factor[row, row]
            weights[row + 1 : rows.stop] -= factor[row, row + 1 : rows.stop, None] * error
        weights[rows.stop :] -= factor[rows, rows.stop :].T @ errors
    return codes


def _factor(products: Float64[np.ndarray, "n n"]) -> Float32[np.ndarray, "n n"]:
    """The upper Cholesky factor of the inverse: a row says how later inputs make up for its error."""
    size = len(products)
    mean = np.trace(products) / size
    if mean == 0:
        return np.eye(size, dtype=np.float32)
    damped = products + _DAMPING * mean * np.eye(size)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
