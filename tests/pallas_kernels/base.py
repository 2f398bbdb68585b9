"""The tests that every backend of the grouped kernels has to pass: right, batch-invariant, and no row left unwritten.

A backend's test module has one subclass of `BackendTests`, named `Test...`, with its name, target and sizes. Backends
that run in an interpreter choose small sizes and few patterns.
"""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BACKENDS,
    UNGATED_ACTIVATIONS,
    ExpertBiases,
    Problem,
    Target,
    default_target,
    dequantize,
    grouped_ffn,
    lossy_quantize,
    slot_grouped_matmul,
    to_storage,
)

ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
_ERF = np.vectorize(math.erf, otypes=[float])
ACTIVATIONS_F64 = {
    "silu": lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "gelu": lambda gate, up: 0.5 * gate * (1 + _ERF(gate / math.sqrt(2))) * up,
    "gelu_tanh": lambda gate, up: 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up,
    "relu": lambda gate, up: np.maximum(gate, 0) * up,
    "relu2": lambda gate, up: np.maximum(gate, 0) ** 2 * up,
    "clamped_swiglu": lambda gate, up: (
        np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1)
    ),
}


def spans(slots: Iterable[int], sizes: Iterable[int]) -> Iterable[tuple[int, slice]]:
    """Slot and rows of each group that has a slot."""
    row = 0
    for slot, size in zip(slots, sizes, strict=True):
        if slot >= 0:
            yield slot, slice(row, row + size)
        row += size


def ffn_f64(
    x: np.ndarray,
    weights: np.ndarray,
    slots: Iterable[int],
    sizes: Iterable[int],
    activation: str = "silu",
    biases: ExpertBiases | None = None,
) -> np.ndarray:
    """`grouped_ffn` in f64; rows of no group are zero."""
    y = np.zeros_like(x)
    for slot, rows in spans(slots, sizes):
        *into, down = weights[slot]
        projected = [x[rows] @ part.T for part in into]
        if biases is not None:
            projected = [of + in_f64(bias[slot]) for of, bias in zip(projected, biases[:2], strict=True)]
        # An activation of one projection is that of a gate whose up projection is one.
        gate, up = projected if len(projected) == 2 else (*projected, np.float64(1))
        y[rows] = ACTIVATIONS_F64[activation](gate, up) @ down
        if biases is not None:
            y[rows] += in_f64(biases.down[slot])
    return y


def in_f64(values: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(values).astype(jnp.float32), np.float64)


def bits(values: Any) -> np.ndarray:
    return np.asarray(values).view(np.uint8)


def assert_close(got: Any, expected: np.ndarray, error: float) -> None:
    """Relative to the largest magnitude, as rounding errors of a sum are."""
    wide = in_f64(got)
    assert np.isfinite(wide).all()
    assert np.abs(wide - expected).max() <= error * np.abs(expected).max()


class BackendTests:
    """What a subclass sets: the backend's name, what to build for, sizes, and what it cannot do."""

    implementation: ClassVar[str]
    target: ClassVar[Target | None] = None
    hidden: ClassVar[int] = 64
    width: ClassVar[int] = 32
    slots: ClassVar[int] = 12
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    activations: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS_F64)
    formats: ClassVar[tuple[str, ...]] = ("int8", "int4", "mxfp4")
    tile_heights: ClassVar[tuple[int, ...]] = (8, 32)
    pattern_step: ClassVar[int] = 1  # 1: every pattern of empty groups

    @pytest.fixture(autouse=True)
    def _only_what_is_offered(self, request: pytest.FixtureRequest) -> None:
        parameters = getattr(request.node, "callspec", None)
        for name, offered in (
            ("dtype", self.dtypes),
            ("activation", self.activations),
            ("format", self.formats),
            ("tile_rows", self.tile_heights),
        ):
            if parameters is not None and name in parameters.params and parameters.params[name] not in offered:
                pytest.skip(f"the {self.implementation} backend has no {name} {parameters.params[name]} in its tests")

    def random(self, shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> jax.Array:
        values = np.random.default_rng((seed, *shape)).normal(size=shape) * scale
        return jnp.asarray(values, dtype)

    def pool(self, dtype: str, seed: int = 0) -> jax.Array:
        return self.random((self.slots, 3, self.width, self.hidden), dtype, seed, 0.2)

    def run(self, *arguments: Any, **options: Any) -> jax.Array:
        options = {"tile_rows": 8} | options
        return _jitted(self.implementation, self.target, tuple(sorted(_static(options).items())))(
            *arguments, **{name: value for name, value in options.items() if name not in _STATIC}
        )

    @pytest.mark.parametrize("dtype", ERROR)
    @pytest.mark.parametrize("activation", ACTIVATIONS_F64)
    def test_equals_float64(self, dtype: str, activation: str) -> None:
        if activation != "silu" and dtype == "float16":
            pytest.skip("activations are computed in float32 whatever the rows are")
        x, pool = self.random((30, self.hidden), dtype, 1), self.pool(dtype)
        slots, sizes = np.int32([3, -1, 0, 11, 5]), np.int32([4, 3, 0, 20, 1])
        y = self.run(x, to_storage(pool), slots, sizes, activation=activation)
        assert y.dtype == x.dtype
        assert_close(y, ffn_f64(in_f64(x), in_f64(pool), slots, sizes, activation), ERROR[dtype])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("tile_rows", [8, 16, 32, 64, 128])
    def test_every_height_of_tile(self, dtype: str, tile_rows: int) -> None:
        x, pool = self.random((150, self.hidden), dtype, 2), self.pool(dtype)
        slots, sizes = np.int32([2, 7, 7, 1]), np.int32([5, 131, 1, 9])
        y = self.run(x, to_storage(pool), slots, sizes, tile_rows=tile_rows)
        assert_close(y, ffn_f64(in_f64(x), in_f64(pool), slots, sizes), ERROR[dtype])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_biases(self, dtype: str) -> None:
        x, pool = self.random((20, self.hidden), dtype, 3), self.pool(dtype)
        biases = ExpertBiases(
            *(self.random((self.slots, size), dtype, 4 + size) for size in (self.width, self.width, self.hidden))
        )
        slots, sizes = np.int32([4, 9, -1, 0]), np.int32([7, 1, 3, 9])
        y = self.run(x, to_storage(pool), slots, sizes, biases=biases, activation="clamped_swiglu")
        expected = ffn_f64(in_f64(x), in_f64(pool), slots, sizes, "clamped_swiglu", biases)
        assert_close(y, expected, ERROR[dtype])

    @pytest.mark.parametrize("activation", [*UNGATED_ACTIVATIONS])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_blocks_without_a_gate(self, dtype: str, activation: str) -> None:
        x, pool = self.random((20, self.hidden), dtype, 3), self.pool(dtype)[:, :2]
        slots, sizes = np.int32([4, 9, -1, 0]), np.int32([7, 1, 3, 9])
        y = self.run(x, to_storage(pool), slots, sizes, activation=activation)
        assert_close(y, ffn_f64(in_f64(x), in_f64(pool), slots, sizes, activation), ERROR[dtype])

    @pytest.mark.parametrize("format", ["int8", "int4", "mxfp4"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_quantized(self, format: str, dtype: str) -> None:
        x, pool = self.random((20, self.hidden), dtype, 5), lossy_quantize(self.pool("float32"), format)
        slots, sizes = np.int32([4, 9, -1, 0]), np.int32([7, 1, 3, 9])
        y = self.run(x, pool, slots, sizes)
        assert_close(y, ffn_f64(in_f64(x), in_f64(dequantize(pool)), slots, sizes), ERROR[dtype])

    def test_every_pattern_of_empty_groups(self) -> None:
        dtype = "float32" if "float32" in self.dtypes else "bfloat16"
        x, pool = self.random((27, self.hidden), dtype, 6), self.pool(dtype)
        slots, full = np.int32([7, 0, 3, 1, 9, 2, 11, 4]), np.int32([3, 1, 9, 2, 4, 1, 5, 2])
        poison = jnp.full_like(x, 777.0)
        for pattern in list(itertools.product((0, 1), repeat=8))[:: self.pattern_step]:
            sizes = full * np.int32(pattern)
            y = self.run(x, to_storage(pool), slots, sizes, out=poison)
            total = int(sizes.sum())
            if total:
                assert_close(y[:total], ffn_f64(in_f64(x), in_f64(pool), slots, sizes)[:total], ERROR[dtype])
            assert (in_f64(y[total:]) == in_f64(poison[total:])).all()

    def test_rows_of_skipped_groups_and_past_the_last_group_keep_what_out_holds(self) -> None:
        dtype = self.dtypes[0]
        x, pool = self.random((20, self.hidden), dtype, 7), self.pool(dtype)
        poison = jnp.full_like(x, 777.0)
        y = in_f64(self.run(x, to_storage(pool), np.int32([2, -1, 5]), np.int32([6, 4, 3]), out=poison))
        kept = np.all(y == in_f64(poison)[:1], axis=1)
        assert kept.tolist() == [False] * 6 + [True] * 4 + [False] * 3 + [True] * 7
        assert np.isfinite(y).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("tile_rows", [8, 32])
    def test_a_row_does_not_depend_on_its_company(self, dtype: str, tile_rows: int) -> None:
        """The same group alone, with others, in another slot, of a larger pool: the same bits."""
        pool, x = self.pool(dtype), self.random((48, self.hidden), dtype, 8)
        larger = jnp.concatenate([pool, pool])
        for size, before in ((1, 0), (11, 5), (20, 28)):
            group = x[:size]
            lone = self.run(group, to_storage(pool), np.int32([4]), np.int32([size]), tile_rows=tile_rows)
            mixed = jnp.concatenate([x[20 : 20 + before], group, x[: 48 - size - before]])
            slots, sizes = np.int32([1, 4 + self.slots, 6]), np.int32([before, size, 48 - size - before])
            company = self.run(mixed, to_storage(larger), slots, sizes, tile_rows=tile_rows)
            assert np.array_equal(bits(lone), bits(company[before : before + size]))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("tile_rows", [8, 32])
    def test_a_row_does_not_depend_on_its_place_in_a_tile(self, dtype: str, tile_rows: int) -> None:
        pool, x = self.pool(dtype), self.random((tile_rows, self.hidden), dtype, 9)
        slots, sizes = np.int32([3]), np.int32([tile_rows])
        rows = [
            bits(self.run(jnp.roll(x, place, 0), to_storage(pool), slots, sizes, tile_rows=tile_rows)[place])
            for place in {0, 1, 7, tile_rows // 2, tile_rows - 1}
        ]
        assert all(np.array_equal(row, rows[0]) for row in rows)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_groups_of_one_row_need_no_sizes(self, dtype: str) -> None:
        pool, x = to_storage(self.pool(dtype)), self.random((6, self.hidden), dtype, 10)
        slots, before = np.int32([3, 0, -1, 7, 11, 3]), jnp.full_like(x, 9)
        short = self.run(x, pool, slots, None, out=before)
        long = self.run(x, pool, slots, np.ones(6, np.int32), out=before)
        assert np.array_equal(bits(short), bits(long))
        assert (in_f64(short[2]) == 9).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_matmul_equals_float64(self, dtype: str, transposed: bool) -> None:
        shape = (self.width, self.hidden) if transposed else (self.hidden, self.width)
        pool, x = self.random((self.slots, *shape), dtype, 11, 0.2), self.random((22, self.hidden), dtype, 12)
        slots, sizes = np.int32([3, -1, 0, 10]), np.int32([9, 2, 0, 8])
        before = jnp.full((22, self.width), 5, dtype)
        y = slot_grouped_matmul(
            x,
            to_storage(pool),
            slots,
            sizes,
            transposed=transposed,
            tile_rows=8,
            out=before,
            implementation=self.implementation,
            target=self.target,
        )
        weights, expected = in_f64(pool), np.full((22, self.width), 5.0)
        for slot, rows in spans(slots, sizes):
            expected[rows] = in_f64(x)[rows] @ (weights[slot].T if transposed else weights[slot])
        assert_close(y, expected, ERROR[dtype])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_outer_equals_float64(self, dtype: str) -> None:
        a, b = self.random((40, self.width), dtype, 13), self.random((40, self.hidden), dtype, 14)
        slots, sizes = np.int32([3, -1, 0, 3, 10]), np.int32([9, 2, 0, 8, 18])
        problem = Problem(
            rows=40,
            groups=5,
            slots=self.slots,
            contract=self.hidden,
            width=self.width,
            dtype=np.dtype(a.dtype),
            tile_rows=8,
            target=self.target or default_target(),
        )
        sums = BACKENDS[self.implementation].outer(a, b, jnp.asarray(slots), jnp.asarray(sizes), problem)
        expected = np.zeros((self.slots, self.width, self.hidden))
        for slot, rows in spans(slots, sizes):
            expected[slot] += in_f64(a)[rows].T @ in_f64(b)[rows]
        assert sums.dtype == jnp.float32
        assert_close(sums, expected, 1e-5)


_STATIC = ("activation", "tile_rows")


def _static(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _STATIC}


@functools.cache
def _jitted(implementation: str, target: Target | None, options: tuple[tuple[str, Any], ...]) -> Any:
    """One program for each set of shapes, whatever the groups are."""
    return jax.jit(functools.partial(grouped_ffn, implementation=implementation, target=target, **dict(options)))
