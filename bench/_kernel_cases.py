"""What the kernels are measured on: shapes of published models, how rows fall to experts, and the device's ceilings."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import _report
from bench._kernel_timing import in_a_row, spread_of_turns
from pallas_kernels import storage_dtype

ROUTINGS = ("balanced", "zipf", "one", "empty")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Experts of a layer: D, F, E, K; `rows` are measured besides the usual ones."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    rows: tuple[int, ...] = ()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="bundled", hidden=192, width=64, experts=32, top_k=4),
        Shape(name="olmoe", hidden=2048, width=1024, experts=64, top_k=8),
        Shape(name="mixtral", hidden=4096, width=14336, experts=8, top_k=2, rows=(8192,)),
        Shape(name="qwen3", hidden=2048, width=768, experts=128, top_k=8, rows=(131072,)),
        Shape(name="deepseek", hidden=2048, width=1408, experts=64, top_k=6),
        Shape(name="gpt_oss", hidden=2880, width=2880, experts=32, top_k=4),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of `SHAPES`, or the sizes `D,F,E,K`."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is neither D,F,E,K nor one of {', '.join(SHAPES)}")
    hidden, width, experts, top_k = map(int, numbers)
    return Shape(name=text, hidden=hidden, width=width, experts=experts, top_k=top_k)


def group_sizes(shape: Shape, rows: int, routing: str) -> np.ndarray:
    """`[E]`, rows of each expert: evenly, by Zipf's law, all to one expert, or evenly to every other expert."""
    sizes = np.zeros(shape.experts, np.int32)
    if routing == "zipf":
        share = 1 / np.arange(1, shape.experts + 1)
        drawn = np.random.default_rng(0).choice(shape.experts, rows, p=share / share.sum())
        return np.bincount(drawn, minlength=shape.experts).astype(np.int32)
    places = {"balanced": slice(None), "one": slice(0, 1), "empty": slice(None, None, 2)}[routing]
    count = len(sizes[places])
    sizes[places] = rows // count + (np.arange(count) < rows % count)
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A layer's blocks, as the slot pool has them and as matmuls over experts want them.

    Attributes:
      pool: `[E, 3, F, D]` of the storage dtype.
      gate_up: `[E, D, 2F]`.
      down: `[E, F, D]`.
    """

    pool: jax.Array
    gate_up: jax.Array
    down: jax.Array


def make_weights(shape: Shape, dtype: np.dtype) -> Weights:
    """Random weights such that results are about as large as rows."""

    @jax.jit
    def made(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sizes = (shape.experts, 3, shape.width, shape.hidden)
        floats = jax.random.normal(key, sizes, dtype) * jnp.asarray(shape.hidden**-0.5, dtype)
        gate_up = floats[:, :2].reshape(shape.experts, 2 * shape.width, shape.hidden).swapaxes(1, 2)
        stored = storage_dtype(dtype)
        pool = floats if stored == dtype else jax.lax.bitcast_convert_type(floats, stored)
        return pool, gate_up, floats[:, 2]

    return Weights(**dict(zip(("pool", "gate_up", "down"), made(jax.random.key(0)), strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One set of rows: `x [M, D]` and `sizes [E]` on the host; what a perfect kernel reads and computes."""

    shape: Shape
    dtype: np.dtype
    sizes: np.ndarray
    weights: Weights

    @functools.cached_property
    def x(self) -> jax.Array:
        return jax.random.normal(jax.random.key(1), (self.rows, self.shape.hidden), self.dtype)

    @property
    def rows(self) -> int:
        return int(self.sizes.sum())

    @property
    def active_bytes(self) -> int:
        """Of the blocks that have rows."""
        block = 3 * self.shape.hidden * self.shape.width * self.dtype.itemsize
        return int(np.count_nonzero(self.sizes)) * block

    @property
    def operations(self) -> int:
        return 6 * self.rows * self.shape.hidden * self.shape.width


def ceilings(dtype: np.dtype, megabytes: int, size: int, repeats: int) -> dict[str, Any]:
    """What the device does at best: bytes a second of a copy, read and written, and operations a second of a matmul.

    Args:
      dtype: of the matmul, which sums in float32.
      megabytes: of the array that is copied.
      size: of the square matrices.
      repeats: how often; the fastest counts, because a ceiling is.
    """
    array = jnp.zeros((megabytes * 2**8, 2**10), jnp.float32)
    square = jnp.ones((size, size), dtype)
    programs: dict[str, tuple[Callable[..., jax.Array], Sequence[jax.Array], float]] = {
        "copy_bytes_per_second": (lambda x: -x, (array,), 2 * array.nbytes),
        "matmul_operations_per_second": (
            lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype),
            (square, square),
            2 * size**3,
        ),
    }
    turns = spread_of_turns(
        {name: in_a_row(function, arguments) for name, (function, arguments, _) in programs.items()}, repeats
    )
    best = {name: work / turns[name]["min"] for name, (_, _, work) in programs.items()}
    return {name: _report.rounded(value) for name, value in best.items()} | {"megabytes": megabytes, "matrix": size}
