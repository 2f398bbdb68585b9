"""FP8 weights with block scales: exactly what multiplying them in float32 and rounding once gives."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ef_jax.errors import UnsupportedError
from ef_jax.families import Fp8Blocks, fp8_blocks
from ef_jax.weights.fp8 import dequantize, has_nan

BLOCKS = Fp8Blocks(rows=4, columns=8)
RELEASED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def matrix(rows: int, columns: int, scale: float, blocks: Fp8Blocks = BLOCKS) -> tuple[np.ndarray, np.ndarray]:
    """Every finite e4m3 value, subnormal ones and both zeros too, and scales about `scale`."""
    random = np.random.default_rng(0)
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    scales = random.random(blocks.scales_of((rows, columns))) * scale
    return random.choice(finite, (rows, columns)), scales.astype(np.float32)


def plain(values: np.ndarray, scales: np.ndarray, dtype: Any, blocks: Fp8Blocks = BLOCKS) -> np.ndarray:
    """One element at a time, as the format is written down."""
    row, column = np.indices(values.shape)
    of_element = scales[row // blocks.rows, column // blocks.columns]
    return (values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * of_element).astype(dtype)


@pytest.mark.parametrize("scale", [1e-40, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (13, 21), (3, 5)])
def test_every_value_and_ragged_edges(rows: int, columns: int, dtype: Any, scale: float) -> None:
    values, scales = matrix(rows, columns, scale)
    with np.errstate(over="ignore"):  # of 448 in float16
        expected = plain(values, scales, dtype)
        for first, end in ((0, rows), (2, 3), (1, rows)):
            out = np.full((end - first, columns), 7, dtype)
            dequantize(values[first:end], scales, BLOCKS, first, out)
            assert out.tobytes() == expected[first:end].tobytes()


def test_more_rows_than_are_taken_at_once() -> None:
    blocks = Fp8Blocks(rows=128, columns=128)
    values, scales = matrix(700, 300, 1e-3, blocks)
    out = np.empty((300, 700), np.float32).T  # into a transposed place
    dequantize(values, scales, blocks, 0, out)
    np.testing.assert_array_equal(out, plain(values, scales, np.float32, blocks))


def test_nan() -> None:
    values, _ = matrix(9, 9, 1.0)
    assert not has_nan(values)
    for code in (0x7F, 0xFF):
        damaged = values.copy()
        damaged[8, 8] = code
        assert np.isnan(damaged.view(ml_dtypes.float8_e4m3fn)[8, 8].astype(np.float32))
        assert has_nan(damaged)


def test_released_configs() -> None:
    assert fp8_blocks({}) is None
    assert fp8_blocks({"quantization_config": None}) is None
    assert fp8_blocks({"quantization_config": {"quant_method": "mxfp4"}}) is None
    assert fp8_blocks({"quantization_config": RELEASED}) == Fp8Blocks(rows=128, columns=128)
    assert fp8_blocks({"quantization_config": RELEASED | {"scale_fmt": "ue8m0"}}), "DeepSeek-V3.1"
    minimax = RELEASED | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]}
    assert fp8_blocks({"quantization_config": minimax}) == Fp8Blocks(rows=128, columns=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2': only e4m3"),
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme is 'static'"),
        ({"weight_block_size": [128]}, r"weight_block_size must be \[rows, columns\], got \[128\]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size must be"),
        ({"weight_block_size": None}, "weight_block_size must be"),
        ({"scale_fmt": "int8"}, "scale_fmt is 'int8': only 'float' and 'ue8m0'"),
        ({"surprise": 1}, "quantization_config.'surprise' with value 1"),
    ],
)
def test_what_is_not_implemented_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        fp8_blocks({"quantization_config": RELEASED | change})


@pytest.mark.parity
def test_against_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    blocks = Fp8Blocks(rows=128, columns=128)
    values, scales = matrix(256, 384, 1e-3, blocks)
    quantized = torch.from_numpy(values).view(torch.float8_e4m3fn)
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
        expected = Fp8Dequantize(None)._dequantize_one(quantized, torch.from_numpy(scales), getattr(torch, name))
        out = np.empty(values.shape, dtype)
        dequantize(values, scales, blocks, 0, out)
        np.testing.assert_array_equal(out.astype(np.float32), expected.float().numpy())
