"""What quantized blocks mean, and how close `lossy_quantize` comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedPool, dequantize, lossy_quantize
from pallas_kernels.grouped_ffn.quantized import FORMATS, check_quantized, decode_scales

S, F, D = 2, 64, 128
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def blocks(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(S, 3, F, D)), jnp.float32)


@pytest.mark.parametrize(("format", "error"), [("int8", 0.012), ("int4", 0.12), ("mxfp4", 0.15)])
def test_rounding_is_as_fine_as_the_format(format: str, error: float) -> None:
    exact = np.asarray(blocks())
    close = np.asarray(dequantize(lossy_quantize(blocks(), format)))
    relative = np.linalg.norm(close - exact) / np.linalg.norm(exact)
    assert error / 3 < relative < error


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_on_the_grid_stays(format: str) -> None:
    """Dequantized weights quantize to themselves, so a checkpoint in such a format loses nothing."""
    once = dequantize(lossy_quantize(blocks(1), format))
    again = dequantize(lossy_quantize(once, format))
    np.testing.assert_allclose(np.asarray(again), np.asarray(once), rtol=0 if format == "mxfp4" else 1e-2)


def test_mxfp4_by_hand() -> None:
    """Codes 0 to 15 in the low halves, their complements in the high ones, a scale of 2^3 and one of 2^-123."""
    low = np.arange(16, dtype=np.uint8)
    row = np.tile(low | ((15 - low) << 4), 2)  # 32 bytes: 64 columns
    values = jnp.asarray(np.broadcast_to(row, (1, 3, 32, 32)))
    gate_up = np.full((1, 2, 32, 2), 130, np.uint8)
    gate_up[..., 1] = 4
    down = np.full((1, 1, 64), 127, np.uint8)
    weights = np.asarray(
        dequantize(
            QuantizedPool(
                values=values, gate_up_scales=jnp.asarray(gate_up), down_scales=jnp.asarray(down), format="mxfp4"
            )
        )
    )
    signed = np.array([*E2M1, *(-np.array(E2M1))], np.float32)
    assert weights[0, 0, 5, :16].tolist() == (signed * 8).tolist()
    assert weights[0, 1, 5, 32:48].tolist() == (signed[::-1] * np.float32(2.0**-123)).tolist()
    assert weights[0, 2, 5, :16].tolist() == signed.tolist()
    assert weights[0, 2, 5, 48:64].tolist() == signed[::-1].tolist()


def test_e8m0_scales() -> None:
    scales = np.asarray(decode_scales(jnp.uint8([0, 1, 127, 254, 255])))
    assert scales[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(scales[4])


def test_zero_blocks_stay_zero() -> None:
    for format in FORMATS:
        assert not np.asarray(dequantize(lossy_quantize(jnp.zeros((1, 3, F, D)), format))).any()


def test_groups_follow_the_axis_that_is_summed_over() -> None:
    """An outlier coarsens its own group only: along D for gate and up, along F for down."""
    spiked = blocks(2).at[0, 0, 3, 5].set(1000.0).at[0, 2, 5, 3].set(1000.0)
    plain, coarse = (np.asarray(dequantize(lossy_quantize(b, "int4", group=32))) for b in (blocks(2), spiked))
    changed = np.argwhere(plain != coarse)
    gate, down = changed[changed[:, 1] == 0], changed[changed[:, 1] == 2]
    assert set(gate[:, 2]) == {3}
    assert gate[:, 3].max() < 32
    assert set(down[:, 3]) == {3}
    assert down[:, 2].max() < 32
    assert not (changed[:, 1] == 1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": jnp.zeros((S, 3, F, D // 2), jnp.int8)}, "int4 values must be uint8, got int8"),
        ({"gate_up_scales": jnp.zeros((S, 2, F, 3), jnp.bfloat16)}, r"gate_up_scales \(2, 2, 64, 3\) do not fit"),
        ({"down_scales": jnp.zeros((S, 2, D), jnp.float32)}, "down_scales of int4 must be bfloat16, got float32"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change: dict, message: str) -> None:
    good = lossy_quantize(blocks(), "int4")
    parts = {
        "values": good.values,
        "gate_up_scales": good.gate_up_scales,
        "down_scales": good.down_scales,
        "format": "int4",
    }
    with pytest.raises(ValueError, match=message):
        check_quantized(QuantizedPool(**(parts | change)))


def test_a_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="groups of 48 do not divide half of D 128 and F 64"):
        lossy_quantize(blocks(), "int4", group=48)
