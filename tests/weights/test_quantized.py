"""Experts rounded to int8 and int4: on load and in conversions alike, near the originals, and never by mistake."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_tools.to_orbax
from checkpoints_tools.cli import main
from ef_jax.errors import CheckpointError, InputError, UnsupportedError
from ef_jax.families import spec_from_config
from ef_jax.spec.block_format import block_format
from ef_jax.weights import Checkpoint, open_checkpoint
from ef_jax.weights.quantize import quantize_block
from ef_jax.weights.quantized import QuantizedCheckpoint, quantized_spec
from pallas_kernels import QuantizedPool, dequantize, lossy_quantize
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint
from tests.weights.test_gpt_oss import FLOATS, MXFP4
from tests.weights.test_gpt_oss import random_tensors as gpt_oss_tensors

CONFIG_FILES = Path(__file__).parent.parent / "fixtures" / "configs"
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3}
CONFIG: dict[str, Any] = CONFIGS["qwen3_moe"] | SIZES


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "original", CONFIG, random_tensors(CONFIG))


def read(checkpoint: Checkpoint, layer: int, expert: int) -> np.ndarray:
    form = checkpoint.spec.block_format
    block = np.full(form.shape, 99, form.dtype)
    checkpoint.read_block(layer, expert, block)
    return block


def floats(checkpoint: Checkpoint, block: np.ndarray) -> np.ndarray:
    """The weights `[3, F, D]` that a quantized block stands for."""
    parts = checkpoint.spec.block_format.split(block)
    arrays = {name: jnp.asarray(parts[name][None]) for name in ("values", "gate_up_scales", "down_scales")}
    format = checkpoint.spec.experts.quantization
    assert format in ("int8", "int4")
    return np.asarray(dequantize(QuantizedPool(**arrays, format=format)))[0]


@pytest.mark.parametrize(("dtype", "format", "group"), [("bfloat16", "int8", None), ("float16", "int4", 64)])
def test_blocks_are_those_of_the_kernels_rounding(dtype: str, format: Any, group: int | None) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 64, 256)).astype(dtype)
    weights[0, 3], weights[2, :, 5] = 0, 0
    of = block_format(weights.shape, dtype)
    to = block_format(weights.shape, dtype, quantization=format, group=group)
    block = np.empty(to.shape, to.dtype)
    quantize_block(weights, of, block, to)
    ours, theirs = to.split(block), lossy_quantize(jnp.asarray(weights[None]), format, group=group or 32)
    for name, array in ours.items():
        same = np.asarray(getattr(theirs, name))[0]
        assert array.dtype == same.dtype
        # XLA's quotients may differ in the last bit, and then a weight half-way between two codes goes the other way.
        if name == "values":
            assert (array != same).mean() < 0.001
        else:
            np.testing.assert_allclose(array.astype(np.float32), same.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.53), ("int4:64", 0.27)])
def test_a_conversion_has_the_blocks_of_a_load(
    original: Path, tmp_path: Path, quantization: str, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "converted"
    assert main([str(original), str(destination), "--quantize", quantization, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts_in"] == quantization
    with open_checkpoint(original) as plain, open_checkpoint(destination) as converted:
        wrapped = QuantizedCheckpoint(plain, quantization)
        assert wrapped.spec == converted.spec
        assert converted.spec.rounded_to == quantization
        assert converted.spec.block_bytes < share * plain.spec.block_bytes
        saved = plain.spec.total_experts * (plain.spec.block_bytes - converted.spec.block_bytes)
        assert converted.nbytes == plain.nbytes - saved
        for (name, ours), (same_name, array) in zip(wrapped.dense(), converted.dense(), strict=True):
            assert name == same_name
            assert ours.tobytes() == array.tobytes()
        for layer, expert in ((1, 0), (2, 3)):
            block = read(wrapped, layer, expert)
            assert block.tobytes() == read(converted, layer, expert).tobytes()
            exact = read(plain, layer, expert).astype(np.float32)
            # Half a step, and for int4 what rounding the scale to bfloat16 adds.
            step = np.abs(exact).max() / (127 if quantization == "int8" else 7)
            assert np.abs(floats(wrapped, block) - exact).max() < 0.53 * step
    assert main([str(destination), str(tmp_path / "back"), "--to", "huggingface"]) == 2
    assert "no way back" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_conversion_goes_on_in_the_same_format_only(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, words = tmp_path / "converted", [str(original), str(tmp_path / "converted")]
    save, needed = checkpoints_tools.to_orbax._save, []

    def stop_at_the_second_layer(path: Path, tree: dict[str, np.ndarray]) -> None:
        if path.name == "00002":
            raise KeyboardInterrupt
        save(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_tools.to_orbax, "_save", stop_at_the_second_layer)
        patch.setattr(checkpoints_tools.to_orbax, "check_new", lambda _, nbytes: needed.append(nbytes))
        main([*words, "--quantize", "int4"])
    with open_checkpoint(original) as plain:
        rest = plain.nbytes - plain.spec.total_experts * plain.spec.block_bytes
        small = quantized_spec(plain.spec, "int4").block_bytes
        assert 0 < needed[0] - rest - plain.spec.total_experts * small < 2 << 20, (
            "the space of small blocks is asked for"
        )
    for other in ([], ["--quantize", "int8"], ["--quantize", "int4:64"]):
        assert main([*words, *other]) == 2
        assert "another source or to another dtype or quantization" in capsys.readouterr().err
    assert main([*words, "--quantize", "int4", "--verify"]) == 0
    manifest = json.loads((destination / "manifest.json").read_text())
    assert manifest["quantization"] == "int4:32"
    assert manifest["spec"]["experts"]["group"] == 32
    manifest["quantization"] = "int3"
    (destination / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="malformed"):
        open_checkpoint(destination)


def test_biases_stay_as_they_are(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", FLOATS, gpt_oss_tensors(FLOATS, "interleaved"))
    with open_checkpoint(path) as plain:
        rounded = QuantizedCheckpoint(plain, "int4")
        ours = rounded.spec.block_format.split(read(rounded, 1, 2))
        exact = plain.spec.block_format.split(read(plain, 1, 2))
        for name in ("gate_bias", "up_bias", "down_bias"):
            assert ours[name].tobytes() == exact[name].tobytes()


@pytest.mark.parametrize(
    ("config", "quantization", "kind", "message"),
    [
        (CONFIG, "int5", InputError, "int5"),
        (CONFIG, "int4:48", InputError, "int4:48"),
        (CONFIG, "int4:128", InputError, "width 64 and half of the hidden size 128: 32, 64 would"),
        (CONFIGS["qwen3_moe"], "int4", InputError, "int8 would do"),
        (MXFP4, "int8", UnsupportedError, "mxfp4 already"),
    ],
)
def test_what_cannot_be_rounded(config: dict[str, Any], quantization: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        quantized_spec(spec_from_config(config), quantization)


def test_rounded_once_and_experts_without_a_gate() -> None:
    once = quantized_spec(spec_from_config(CONFIG), "int8")
    with pytest.raises(UnsupportedError, match="int8 already"):
        quantized_spec(once, "int4")
    switch = spec_from_config(json.loads((CONFIG_FILES / "switch-base-8.json").read_text()))
    with pytest.raises(UnsupportedError, match="without a gate"):
        quantized_spec(switch, "int8")
