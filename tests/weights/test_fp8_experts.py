"""Experts in FP8 as released: the same bytes on disk, on the host and in the slots, the same results as in floats."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import ef_jax
from checkpoints_tools.cli import main
from ef_jax.errors import CheckpointError, UnsupportedError
from ef_jax.families import FP8_AS_RELEASED, fp8_experts, spec_from_config
from ef_jax.weights import open_checkpoint
from ef_jax.weights.fp8 import comes_back, dequantize, quantize
from ef_jax.weights.layout import Layout
from tests.checkpoints_tools.test_round_trip import assert_same_files, assert_same_weights, convert, convert_back
from tests.weights.synthetic import same_bits
from tests.weights.test_fp8_checkpoint import CONFIG, is_quantized, write

E, F, D = 4, 160, 192  # of two blocks along each axis, the last cut short
PLAIN: dict[str, Any] = CONFIG | {
    "hidden_size": D,
    "moe_intermediate_size": F,
    "num_attention_heads": 12,  # kv_b_proj has more rows than a block
    "num_key_value_heads": 12,
}
FP8: dict[str, Any] = PLAIN | {
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
}
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"
ATTENTION = "model.layers.1.self_attn.o_proj.weight"


def tensors(scale_dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Of an FP8 checkpoint, as released."""
    random = np.random.default_rng(0)
    found = {}
    for name, (shape, dtype) in Layout(spec_from_config(PLAIN), "per_expert").tensors().items():
        values = random.standard_normal(shape).astype(np.float32)
        if is_quantized(name):
            found[name] = np.clip(values * 100, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            scales = 2.0 ** random.uniform(-12, -9, FP8_AS_RELEASED.scales_of(shape))
            found[f"{name}_scale_inv"] = scales.astype(scale_dtype)
        else:
            found[name] = (values * 0.5).astype(dtype or ml_dtypes.bfloat16)
    return found


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp8") / "released", FP8, tensors(), shards=2)


def test_blocks_hold_the_bytes_of_the_file(released: Path) -> None:
    stored = tensors()
    with open_checkpoint(released) as checkpoint, open_checkpoint(released, "bfloat16") as floats:
        form = checkpoint.spec.block_format
        assert checkpoint.spec.experts.quantization == "fp8"
        assert form.nbytes == 3 * F * D + 2 * 64  # the scales of each part up to a boundary of 64
        assert floats.spec.experts.quantization is None
        block, plain = np.empty(form.shape, form.dtype), np.empty(floats.spec.block_shape, ml_dtypes.bfloat16)
        checkpoint.read_block(1, 2, block)
        floats.read_block(1, 2, plain)
        dense = dict(floats.dense())
        assert all(same_bits(array, dense[name]) for name, array in checkpoint.dense()), "those are floats all the same"
    parts = form.split(block)
    for at, name in enumerate(("gate", "up", "down")):
        tensor = f"model.layers.1.mlp.experts.2.{name}_proj.weight"
        values, scales = stored[tensor], stored[f"{tensor}_scale_inv"]
        ours = parts["values"][at], (*parts["gate_up_scales"], parts["down_scales"])[at]
        row, column = np.indices(values.shape) // 128
        meant = (values.astype(np.float32) * scales[row, column]).astype(ml_dtypes.bfloat16)
        if name == "down":
            values, scales, meant = values.T, scales.T, meant.T
        assert same_bits(ours[0].copy(), values.copy())
        assert same_bits(ours[1].copy(), scales.copy())
        assert same_bits(plain[at], meant.copy())


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_conversion_there_and_back(scale_dtype: Any, tmp_path: Path) -> None:
    original = write(tmp_path / "original", FP8, tensors(scale_dtype), shards=3)
    converted = convert(original, tmp_path / "converted")
    assert_same_weights(original, converted)
    assert_same_files(original, convert_back(converted, tmp_path / "back"))


def test_conversion_to_floats_and_verification(released: Path, tmp_path: Path) -> None:
    for name, options in {"kept": [], "floats": ["--dtype", "bfloat16"]}.items():
        assert main([str(released), str(tmp_path / name), "--verify", *options]) == 0
        assert main([str(tmp_path / name), str(tmp_path / f"{name}-back"), "--to", "huggingface", "--verify"]) == 0
    with open_checkpoint(tmp_path / "floats") as checkpoint:
        assert checkpoint.spec.experts.quantization is None
    with open_checkpoint(tmp_path / "floats-back") as back, open_checkpoint(released, "bfloat16") as floats:
        assert back.spec == floats.spec


def test_results_are_those_of_the_same_weights_in_bfloat16_all_resident(released: Path) -> None:
    """Bit by bit: the kernels round `value x scale` to the rows' dtype once, as dequantizing on load does."""
    prompt = np.random.default_rng(1).integers(0, 48, 9)
    settings: dict[str, Any] = {"context": 32, "chunk": 16, "progress": False, "prefetch": 0}
    fp8 = ef_jax.load(released, expert_fraction=0.5, **settings)
    floats = ef_jax.load(released, expert_fraction=1.0, dtype="bfloat16", **settings)
    assert (fp8.plan.block_bytes, floats.plan.block_bytes) == (fp8.spec.block_bytes, 6 * F * D)
    pool = fp8._engine.link.pool.array
    assert isinstance(pool, dict)
    assert sum(array[0].nbytes for array in jax.tree.leaves(pool)) == 3 * F * D + 3 * 2 * 2 * 4
    logits = [lm.logits(prompt).view(np.uint32) for lm in (fp8, floats)]
    np.testing.assert_array_equal(*logits)
    one, other = (lm.generate([prompt], max_new_tokens=8, ignore_eos=True)[0] for lm in (fp8, floats))
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
    decode = fp8.stats.decode
    assert decode.bytes_demand == sum(decode.misses) * fp8.spec.block_bytes > 0
    assert fp8.stats.slots < fp8.stats.experts


def test_config_says_whether_experts_stay_fp8() -> None:
    quantized = FP8["quantization_config"]
    assert spec_from_config(FP8).experts.quantization == "fp8"
    for changes in ({"dequantize": True}, {"weight_block_size": [64, 64]}):
        config = FP8 | {"quantization_config": quantized | changes}
        assert not fp8_experts(config)
        assert spec_from_config(config).experts.quantization is None


def test_experts_in_floats_beside_a_config_that_speaks_of_fp8(tmp_path: Path) -> None:
    stored = tensors()
    for name in [name for name in stored if ".experts." in name]:
        if name.endswith("_scale_inv"):
            del stored[name]
        else:
            stored[name] = stored[name].astype(ml_dtypes.bfloat16)
    source = write(tmp_path / "mixed", FP8, stored)
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.spec.experts.quantization is None
    with open_checkpoint(convert(source, tmp_path / "converted")) as checkpoint:
        assert checkpoint.spec.experts.quantization is None


def damage(what: str) -> dict[str, np.ndarray]:
    stored = tensors()
    if what == "missing":
        del stored[f"{DOWN}_scale_inv"]
    elif what == "nan":
        stored[DOWN].view(np.uint8)[3, 3] = 0xFF
    elif what == "nan scale":
        stored[f"{DOWN}_scale_inv"][1, 0] = np.nan
    elif what == "float":
        del stored[f"{DOWN}_scale_inv"]
        stored[DOWN] = stored[DOWN].astype(ml_dtypes.bfloat16)
    return stored


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"experts\.2\.down_proj\.weight' is FP8, but its scales .*_scale_inv' are missing"),
        ("nan", r"layer 1 expert 2 of .* holds NaN or infinite weights in float8_e4m3fn"),
        ("nan scale", r"layer 1 expert 2 of .* holds NaN or infinite weights in float32"),
        ("float", r"lacks 1 tensor: .*experts\.2\.down_proj\.weight_scale_inv'"),
    ],
)
def test_damage_is_one_clear_line(what: str, message: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "fp8", FP8, damage(what))

    def read() -> None:
        with open_checkpoint(directory) as checkpoint:
            form = checkpoint.spec.block_format
            checkpoint.read_block(1, 2, np.empty(form.shape, form.dtype))

    with pytest.raises(CheckpointError, match=message) as raised:
        read()
    assert "\n" not in str(raised.value)


def test_scales_from_which_there_is_no_way_back_are_not_converted(tmp_path: Path) -> None:
    stored = tensors()
    stored[f"{ATTENTION}_scale_inv"][0, 0] = 0
    source = write(tmp_path / "zero", FP8, stored)
    with pytest.raises(UnsupportedError, match=r"o_proj\.weight_scale_inv' holds scales .*: convert with a --dtype"):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    assert convert(source, tmp_path / "floats", "bfloat16").exists()


@pytest.mark.parametrize("scale", [1e-30, 3e-4, 1e2])
def test_dequantized_weights_come_back(scale: float) -> None:
    """Every finite value, both zeros too, from bfloat16, whatever the scales are."""
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    random = np.random.default_rng(2)
    values = np.concatenate([finite, random.choice(finite, 300 * 200 - len(finite))]).reshape(300, 200)
    scales = (random.uniform(0.5, 1.0, (3, 2)) * scale).astype(np.float32)
    assert comes_back(scales, "bfloat16")
    weights = np.empty(values.shape, ml_dtypes.bfloat16)
    dequantize(values, scales, FP8_AS_RELEASED, 0, weights)
    for first in (0, 100):
        assert same_bits(quantize(weights[first:], scales, FP8_AS_RELEASED, first), values[first:].copy())


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.0, "float32"), (1e-36, "bfloat16"), (1e36, "bfloat16"), (1e-4, "float16")]
)
def test_scales_out_of_range_are_known(scale: float, dtype: str) -> None:
    assert not comes_back(np.full((1, 2), scale, np.float32), dtype)
