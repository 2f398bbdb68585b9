"""The Triton backend in Pallas's interpreter, as if on an H100; its tiles, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BACKENDS,
    ExpertBiases,
    Problem,
    QuantizedPool,
    Target,
    dequantize,
    grouped_ffn,
    lossy_quantize,
    to_storage,
)
from pallas_kernels.grouped_ffn.activations import ACTIVATIONS, UNGATED_ACTIVATIONS
from pallas_kernels.grouped_ffn.kernel_activations import KERNEL_ACTIVATIONS, UNGATED_KERNEL_ACTIVATIONS
from pallas_kernels.grouped_ffn.tiles import forced_tiles
from pallas_kernels.grouped_ffn.triton_matmul import _place
from pallas_kernels.grouped_ffn.triton_tiles import TritonTiles, candidates, heuristic, tile_height
from tests.pallas_kernels.base import BackendTests, assert_close, ffn_f64, in_f64, spans

H100 = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=2, interpret=True)
TRITON = BACKENDS["triton"]


class TestTriton(BackendTests):
    implementation = "triton"
    target = H100
    dtypes = ("bfloat16", "float32")
    activations = ("silu",)
    tile_heights = (8,)
    pattern_step = 37


def problem(**changes: object) -> Problem:
    fields = {
        "rows": 30,
        "groups": 5,
        "slots": 6,
        "contract": 96,
        "width": 48,
        "dtype": np.dtype("float32"),
        "activation": "silu",
        "target": H100,
    }
    return Problem(**(fields | changes))


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


SLOTS, SIZES = np.int32([3, -1, 0, 5, 5]), np.int32([4, 3, 0, 20, 1])


@pytest.mark.parametrize("format", ["dense", "int4"])
def test_sizes_that_no_tile_divides(format):
    """Masks at the ends of rows, columns and sums; groups of 24 weights that fit no tile."""
    blocks, x = random((6, 3, 48, 96), 0, 0.2), random((30, 96), 1)
    pool = to_storage(blocks) if format == "dense" else lossy_quantize(blocks, format, group=24)
    weights = in_f64(blocks if format == "dense" else dequantize(pool))
    tiles = {"columns": 32, "depth": 64, "warps": 4, "stages": 2}
    biases = ExpertBiases(*(random((6, size), size) for size in (48, 48, 96)))
    with forced_tiles({"gate_up": tiles, "down": tiles}):
        y = grouped_ffn(x, pool, SLOTS, SIZES, biases=biases, tile_rows=8, implementation="triton", target=H100)
    assert_close(y, ffn_f64(in_f64(x), weights, SLOTS, SIZES, "silu", biases), 1e-5)


@pytest.mark.parametrize(
    ("format", "part", "contract_last"),
    [("int8", 0, False), ("int8", 1, True), ("int8", 2, True), ("int4", 2, True), ("mxfp4", 0, False)],
)
def test_quantized_matrices_multiply_from_both_sides(format, part, contract_last):
    """Scales along the sum, and across it, as gradients need them."""
    pool = lossy_quantize(random((6, 3, 32, 64), 2, 0.2), format)
    x, before = random((30, 64 if contract_last else 32), 3), jnp.full((30, 32 if contract_last else 64), 5.0)
    described = problem(contract=64, width=32, storage=format)
    slots, sizes = jnp.asarray(SLOTS), jnp.asarray(SIZES)
    y = TRITON.matmul(x, pool, slots, sizes, before, described, part, contract_last)
    expected, weights = in_f64(before), in_f64(dequantize(pool))[:, part]
    for slot, rows in spans(SLOTS, SIZES):
        expected[rows] = in_f64(x)[rows] @ (weights[slot].T if contract_last else weights[slot])
    assert_close(y, expected, 1e-5)


def test_one_scale_for_all_of_a_channel_in_four_bits():
    blocks = random((6, 3, 32, 64), 4, 0.2)
    fine = lossy_quantize(blocks, "int4")
    pool = QuantizedPool(
        values=fine.values,
        gate_up_scales=fine.gate_up_scales[..., :1],
        down_scales=fine.down_scales[:, :1],
        format="int4",
    )
    x = random((30, 64), 5)
    y = grouped_ffn(x, pool, SLOTS, SIZES, tile_rows=8, implementation="triton", target=H100)
    assert_close(y, ffn_f64(in_f64(x), in_f64(dequantize(pool)), SLOTS, SIZES), 1e-5)


def test_no_group_has_rows():
    pool, out = random((6, 3, 32, 64), 6), random((30, 64), 7)
    y = grouped_ffn(out, pool, SLOTS, 0 * SIZES, out=out, tile_rows=8, implementation="triton", target=H100)
    assert np.array_equal(y, out)


def test_no_rows_at_all():
    pool, none = random((6, 3, 32, 64), 6), jnp.zeros((0, 64))
    assert grouped_ffn(none, pool, SLOTS, 0 * SIZES, implementation="triton", target=H100).shape == (0, 64)
    sums = TRITON.outer(none, none, jnp.asarray(SLOTS), jnp.asarray(0 * SIZES), problem())
    assert sums.shape == (6, 64, 64)
    assert not sums.any()


@pytest.mark.parametrize(("items", "stripes"), [(1, 1), (5, 3), (8, 2), (21, 4)])
def test_programs_are_one_for_each_tile_and_stripe(items, stripes):
    place = jax.vmap(lambda program: _place(program, items, stripes))
    at, stripe = place(jnp.arange(items * stripes, dtype=jnp.int32))
    found = list(zip(at.tolist(), stripe.tolist(), strict=True))
    assert sorted(found) == [(item, column) for item in range(items) for column in range(stripes)]
    assert found[: min(items, 8)] == [(item, 0) for item in range(min(items, 8))]


def test_kernels_compute_the_same_activations():
    gate, up = jnp.linspace(-12.0, 12.0, 4001), random((4001,), 8)
    for name, activation in KERNEL_ACTIVATIONS.items():
        np.testing.assert_allclose(activation(gate, up), ACTIVATIONS[name](gate, up), rtol=0, atol=4e-6)
    for name, activation in UNGATED_KERNEL_ACTIVATIONS.items():
        np.testing.assert_allclose(activation(gate), UNGATED_ACTIVATIONS[name](gate), rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": Target(platform="cpu", device_kind="cpu")}, "needs an NVIDIA GPU, the target is cpu"),
        ({"target": dataclasses.replace(H100, capability=(7, 5))}, r"8\.0 or more, .* has \(7, 5\)"),
        ({"dtype": np.dtype("float64")}, "no kernel for rows of float64"),
        ({"tile_rows": 256}, "at most 128 rows, tile_rows is 256"),
        ({"storage": "int8", "slots": 16, "contract": 4096, "width": 14336}, "the pool's values have 2818572288 bytes"),
    ],
)
def test_what_it_refuses(changes, message):
    assert re.search(message, TRITON.refuses(problem(**changes)))


def test_what_it_does_not_refuse():
    large = {"contract": 4096, "width": 14336}
    for changes in ({}, large | {"slots": 64}, large | {"slots": 64, "storage": "int8"}, large | {"storage": "int4"}):
        assert TRITON.refuses(problem(**changes)) is None


def test_tiles_do_not_depend_on_how_many_rows_there_are():
    for operation in ("gate_up", "down", "matmul", "outer"):
        few, many = problem(rows=8, groups=8, slots=8), problem(rows=10_000, groups=50, slots=999)
        assert heuristic(operation, few) == heuristic(operation, many)


@pytest.mark.parametrize("operation", ["gate_up", "down", "matmul", "outer"])
def test_candidates_are_tiles_and_the_rule_is_the_first(operation):
    described = problem(contract=2880, width=2880, dtype=np.dtype(jnp.bfloat16), tile_rows=128)
    found = [TritonTiles(**tiles) for tiles in candidates(operation, described)]
    assert found[0] == heuristic(operation, described)
    assert len(found) == len(set(found)) > 10


@pytest.mark.parametrize(("rows", "height"), [(1, 16), (8, 16), (17, 32), (100, 128), (128, 128)])
def test_tile_heights_are_powers_of_two(rows, height):
    assert tile_height(problem(tile_rows=rows)) == height


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 8}, "columns of Triton tiles must be a power of two and at least 16, got 8"),
        ({"depth": 96}, "depth of Triton tiles must be a power of two and at least 16, got 96"),
        ({"warps": 3}, "warps of Triton tiles must be a power of two and at least 1, got 3"),
        ({"stages": 0}, "stages of Triton tiles must be at least 1, got 0"),
    ],
)
def test_tiles_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TritonTiles(**({"columns": 32, "depth": 64, "warps": 4, "stages": 3} | changes))


def test_measured_tiles_of_another_backend_are_refused():
    x, pool = random((4, 64), 9), random((6, 3, 32, 64), 9)
    with forced_tiles({"gate_up": {"walk": 4}}), pytest.raises(ValueError, match=r"tiles \{'walk': 4\} of gate_up"):
        grouped_ffn(x, pool, np.int32([1]), np.int32([4]), implementation="triton", target=H100)
