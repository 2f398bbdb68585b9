"""Experts rounded by a text: products with what they read change less than by rounding to nearest."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools import to_orbax
from checkpoints_tools.calibration import CalibratedCheckpoint
from checkpoints_tools.cli import main
from checkpoints_tools.gptq import gptq
from ef_jax.errors import InputError
from ef_jax.weights import open_checkpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from ef_jax.weights.quantize import as_float32, quantize_block
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

CONFIG: dict[str, Any] = CONFIGS["qwen3_moe"] | {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 3}


@pytest.mark.parametrize(("format", "inputs", "group"), [("int4", 320, 32), ("int4", 192, 96), ("int8", 160, 160)])
def test_products_change_less(format: Any, inputs: int, group: int) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((inputs, 24)).astype(np.float32)
    # What an expert reads is correlated, or there would be nothing to make up with.
    read = random.standard_normal((500, inputs // 4)) @ random.standard_normal((inputs // 4, inputs))

    def error(products: np.ndarray) -> float:
        scales = np.empty((inputs // group, 24), np.float32 if format == "int8" else ml_dtypes.bfloat16)
        codes = gptq(weights.copy(), products, scales, format)
        assert np.abs(codes).max() <= (127 if format == "int8" else 7)
        return float(np.linalg.norm(read @ (codes * np.repeat(as_float32(scales), group, axis=0) - weights)))

    assert error(read.T @ read) < 0.6 * error(np.zeros((inputs, inputs)))


def test_experts_that_read_nothing_are_rounded_to_nearest(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", CONFIG, random_tensors(CONFIG))
    random = np.random.default_rng(0)
    with open_checkpoint(path) as plain:
        form = plain.spec.block_format
        # One token over and over: it has two experts, and the third is never asked for.
        calibrated = CalibratedCheckpoint(plain, "int4", [5] * 40)
        assert calibrated.tokens == 32, "whole windows"
        small = calibrated.spec.block_format
        block, nearest = np.empty(form.shape, form.dtype), np.empty(small.shape, small.dtype)
        same = []
        for expert in random.permutation(3):
            out = np.empty(small.shape, small.dtype)
            calibrated.read_block(1, int(expert), out)
            plain.read_block(1, int(expert), block)
            quantize_block(block, form, nearest, small)
            same.append(np.array_equal(out, nearest))
        assert sum(same) == 1
        with pytest.raises(InputError, match="10 tokens: give at least 32"):
            CalibratedCheckpoint(plain, "int4", range(10))


def test_a_conversion_goes_on_to_what_it_would_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {"num_hidden_layers": 3}
    path = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    ids = np.random.default_rng(1).integers(0, 64, 64).tolist()
    save = to_orbax._save

    def stop_at_the_last_layer(path: Path, tree: dict[str, np.ndarray]) -> None:
        if path.name == "00002":
            raise KeyboardInterrupt
        save(path, tree)

    with open_checkpoint(path) as source:
        assert isinstance(source, HuggingFaceCheckpoint)
        whole = to_orbax.convert_to_orbax(source, tmp_path / "whole", quantize="int8", calibrate=ids)
        monkeypatch.setattr(to_orbax, "_save", stop_at_the_last_layer)
        with pytest.raises(KeyboardInterrupt):
            to_orbax.convert_to_orbax(source, tmp_path / "parts", quantize="int8", calibrate=ids)
        monkeypatch.undo()
        with pytest.raises(InputError, match="or quantization"):
            to_orbax.convert_to_orbax(source, tmp_path / "parts", quantize="int8")
        parts = to_orbax.convert_to_orbax(source, tmp_path / "parts", quantize="int8", calibrate=ids)
        nearest = to_orbax.convert_to_orbax(source, tmp_path / "nearest", quantize="int8")
    assert (parts.layers, parts.dense, parts.fingerprint) == (whole.layers, whole.dense, whole.fingerprint)
    assert whole.calibration_tokens == 64
    assert nearest.layers.keys() == whole.layers.keys()
    assert all(nearest.layers[layer] != whole.layers[layer] for layer in whole.layers)
    assert main([str(path), str(tmp_path / "other"), "--calibrate", "text"]) == 2
    assert "--calibrate is for --quantize" in capsys.readouterr().err
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert main([str(path), str(tmp_path / "other"), "--quantize", "int8", "--calibrate", str(tmp_path / "latin")]) == 2
    assert "is not text in UTF-8" in capsys.readouterr().err
