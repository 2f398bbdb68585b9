"""FP8 blocks: what they mean, and that backends compute with them what they compute with the weights in full."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import QuantizedPool, Target, dequantize, grouped_ffn, lossy_quantize, to_storage
from pallas_kernels.grouped_ffn import xla
from pallas_kernels.grouped_ffn.fp8 import FP8_BLOCK, decode_e4m3, scales_shape
from pallas_kernels.grouped_ffn.quantized import check_quantized
from pallas_kernels.grouped_ffn.tiles import forced_tiles
from tests.pallas_kernels.base import assert_close, bits, ffn_f64, in_f64

S, F, D = 4, 160, 320  # the last blocks of both axes are cut short
H100 = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, interpret=True)
SLOTS, SIZES = np.int32([3, 0, -1, 2]), np.int32([7, 1, 3, 9])
FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def pool_of(seed: int, slots: int = S, width: int = F, hidden: int = D) -> QuantizedPool:
    """Every finite value, scales of three powers of ten."""
    random = np.random.default_rng(seed)
    scales = (10.0 ** random.uniform(-5, -2, (slots, 3, *scales_shape(width, hidden)))).astype(np.float32)
    return QuantizedPool(
        values=jnp.asarray(random.choice(FINITE, (slots, 3, width, hidden))),
        gate_up_scales=jnp.asarray(scales[:, :2]),
        down_scales=jnp.asarray(scales[:, 2]),
        format="fp8",
    )


def rows(count: int, dtype: Any, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), dtype)


def test_every_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected[[0x7F, 0xFF]] = 480, -480
    got = np.asarray(jax.jit(decode_e4m3)(codes))
    assert got.tobytes() == expected.tobytes(), "both zeros, and subnormal values too"


@pytest.mark.parametrize(("width", "hidden"), [(1, 129), (128, 16), (200, 384)])
def test_each_value_has_the_scale_of_its_block(width: int, hidden: int) -> None:
    pool = pool_of(0, 1, width, hidden)
    values = np.asarray(pool.values).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    row, column = np.indices((width, hidden)) // FP8_BLOCK
    scales = np.concatenate([pool.gate_up_scales, pool.down_scales[:, None]], axis=1)
    assert np.asarray(dequantize(pool)).tobytes() == (values * scales[:, :, row, column]).tobytes()


@pytest.mark.parametrize(
    ("name", "dtype", "tile_rows", "tiles"),
    [
        ("xla", "bfloat16", 8, None),
        ("xla", "float32", 128, None),
        ("triton", "bfloat16", 8, {"columns": 32, "depth": 64}),
        ("triton", "float32", 128, {"columns": 256, "depth": 32}),  # wider than a block of scales
    ],
)
def test_products_are_those_of_the_dequantized_weights(
    name: str, dtype: str, tile_rows: int, tiles: dict[str, int] | None
) -> None:
    """Bit by bit: weights are rounded to the rows' dtype once, as by reading the checkpoint into that dtype."""
    x, pool = rows(20, dtype), pool_of(2)
    weights = dequantize(pool).astype(dtype)
    of_each = None if tiles is None else tiles | {"warps": 4, "stages": 1}
    target = None if tiles is None else H100

    def run(blocks: Any) -> jax.Array:
        return grouped_ffn(x, blocks, SLOTS, SIZES, tile_rows=tile_rows, implementation=name, target=target)

    with forced_tiles({} if of_each is None else dict.fromkeys(("gate_up", "down"), of_each)):
        y = run(pool)
        assert np.array_equal(bits(y), bits(run(to_storage(weights))))
    assert_close(y, ffn_f64(in_f64(x), in_f64(weights), SLOTS, SIZES), 1e-2 if dtype == "bfloat16" else 1e-5)


def test_the_reference_rounds_nothing() -> None:
    x, pool = rows(20, "float32"), pool_of(3)
    y = grouped_ffn(x, pool, SLOTS, SIZES, implementation="reference")
    assert_close(y, ffn_f64(in_f64(x), in_f64(dequantize(pool)), SLOTS, SIZES), 1e-5)


def test_blocks_in_parts_hold_whole_blocks_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    width, x = 384, rows(12, "float32")
    pool = pool_of(4, 2, width)
    monkeypatch.setattr(xla, "PART_BYTES", 3 * width * D * 4 // 2)  # two parts do not fit
    compute = jax.jit(lambda *given: grouped_ffn(*given, tile_rows=8, implementation="xla"))
    slots, sizes = np.int32([1, 0]), np.int32([5, 7])
    assert f"u8[1,3,128,{D}]" in compute.lower(x, pool, slots, sizes).compile().as_text()
    expected = ffn_f64(in_f64(x), in_f64(dequantize(pool)), slots, sizes)
    assert_close(compute(x, pool, slots, sizes), expected, 1e-5)


def test_rounding_is_as_fine_as_three_bits_of_mantissa() -> None:
    exact = np.random.default_rng(5).normal(size=(2, 3, F, D)).astype(np.float32)
    exact[1, 2, :128, :128] = 0
    pool = lossy_quantize(jnp.asarray(exact), "fp8")
    check_quantized(pool)
    close = np.asarray(dequantize(pool))
    assert 0.02 < np.linalg.norm(close - exact) / np.linalg.norm(exact) < 0.03
    assert not close[1, 2, :128, :128].any()


def test_mosaic_says_why_not() -> None:
    target = dataclasses.replace(H100, interpret=False)
    with pytest.raises(NotImplementedError, match="it has no kernel for fp8 weights"):
        grouped_ffn(rows(4, "bfloat16"), pool_of(6), SLOTS, 0 * SIZES, implementation="mosaic", target=target)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gate_up_scales",
            (S, 2, 1, 3),
            r"gate_up_scales of fp8 must be float32 \[4, 2, 2, 3\], got .* \[4, 2, 1, 3\]",
        ),
        ("down_scales", (S, 3, 2), r"down_scales of fp8 must be float32 \[4, 2, 3\], got float32 \[4, 3, 2\]"),
    ],
)
def test_scales_that_do_not_fit_are_named(name: str, change: tuple[int, ...], message: str) -> None:
    good = pool_of(7)
    parts = {each: getattr(good, each) for each in ("values", "gate_up_scales", "down_scales")}
    with pytest.raises(ValueError, match=message):
        check_quantized(QuantizedPool(**(parts | {name: jnp.zeros(change)}), format="fp8"))
