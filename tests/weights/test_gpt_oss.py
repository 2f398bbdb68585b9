"""gpt-oss checkpoints as released and in floats, made of numpy alone: blocks mean what the tensors mean."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ef_jax.errors import CheckpointError, UnsupportedError
from ef_jax.families import ExpertLayout, spec_from_config
from ef_jax.weights import open_checkpoint
from ef_jax.weights.layout import Layout
from pallas_kernels import QuantizedPool, dequantize
from tests.checkpoints_tools.test_round_trip import assert_same_files, assert_same_weights, convert, convert_back
from tests.weights.synthetic import write_checkpoint

E, D, F = 3, 64, 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FLOATS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}
MXFP4 = FLOATS | {"quantization_config": {"quant_method": "mxfp4"}}


def random_tensors(config: dict[str, Any], experts: ExpertLayout) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {}
    for name, (shape, dtype) in Layout(spec_from_config(config), experts).tensors().items():
        if dtype == "uint8":
            low, high = (120, 130) if name.endswith("_scales") else (0, 256)
            tensors[name] = random.integers(low, high, shape, dtype=np.uint8)
        else:
            tensors[name] = random.standard_normal(shape).astype(ml_dtypes.bfloat16)
    return tensors


def plain(tensors: dict[str, np.ndarray], name: str, expert: int) -> np.ndarray:
    """A released matrix of an expert, `[rows, contract]`: the formula of the format."""
    blocks, scales = tensors[f"{name}_blocks"][expert], tensors[f"{name}_scales"][expert]
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    return (E2M1[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(len(blocks), -1)


def read(path: Path, layer: int, expert: int, dtype: str | None = None) -> dict[str, np.ndarray]:
    with open_checkpoint(path, dtype) as checkpoint:
        form = checkpoint.spec.block_format
        block = np.full(form.shape, 0, form.dtype)
        block.reshape(-1).view(np.uint8)[:] = 77
        checkpoint.read_block(layer, expert, block)
        return form.split(block)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_released_blocks(tmp_path: Path, dtype: str | None) -> None:
    """Codes and scales as they are, in any dtype of the rest; biases in that dtype."""
    tensors = random_tensors(MXFP4, "mxfp4")
    path = write_checkpoint(tmp_path / "released", MXFP4, tensors, shards=2)
    parts = read(path, 1, 2, dtype)
    scales = {name: jnp.asarray(parts[name].view(np.uint8)[None]) for name in ("gate_up_scales", "down_scales")}
    pool = QuantizedPool(values=jnp.asarray(parts["values"][None]), **scales, format="mxfp4")
    gate, up, down = np.asarray(dequantize(pool))[0]
    experts = "model.layers.1.mlp.experts"
    gate_up = plain(tensors, f"{experts}.gate_up_proj", 2)
    np.testing.assert_array_equal(gate, gate_up[0::2])
    np.testing.assert_array_equal(up, gate_up[1::2])
    np.testing.assert_array_equal(down.T, plain(tensors, f"{experts}.down_proj", 2))
    biases = tensors[f"{experts}.gate_up_proj_bias"][2].astype(dtype or ml_dtypes.bfloat16)
    np.testing.assert_array_equal(parts["gate_bias"], biases[0::2])
    np.testing.assert_array_equal(parts["up_bias"], biases[1::2])


def test_blocks_of_floats(tmp_path: Path) -> None:
    tensors = random_tensors(FLOATS, "interleaved")
    parts = read(write_checkpoint(tmp_path / "floats", FLOATS, tensors), 0, 1)
    experts = "model.layers.0.mlp.experts"
    gate_up = tensors[f"{experts}.gate_up_proj"][1]
    np.testing.assert_array_equal(parts["weights"][0], gate_up[:, 0::2].T)
    np.testing.assert_array_equal(parts["weights"][1], gate_up[:, 1::2].T)
    np.testing.assert_array_equal(parts["weights"][2], tensors[f"{experts}.down_proj"][1])
    np.testing.assert_array_equal(parts["up_bias"], tensors[f"{experts}.gate_up_proj_bias"][1, 1::2])
    np.testing.assert_array_equal(parts["down_bias"], tensors[f"{experts}.down_proj_bias"][1])


@pytest.mark.parametrize(("config", "experts"), [(FLOATS, "interleaved"), (MXFP4, "mxfp4")], ids=["floats", "mxfp4"])
def test_conversion_there_and_back(config: dict[str, Any], experts: ExpertLayout, tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", config, random_tensors(config, experts), shards=3)
    converted = convert(original, tmp_path / "converted")
    assert_same_weights(original, converted)
    assert_same_files(original, convert_back(converted, tmp_path / "back"))


def test_a_config_without_the_tensors_that_it_speaks_of(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "mixed", MXFP4, random_tensors(FLOATS, "interleaved"))
    with pytest.raises(CheckpointError, match=r"lacks 8 tensors: 'model.layers.0.mlp.experts.down_proj_blocks'"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": 96}, "mxfp4 experts must have a multiple of 64 as hidden size, got 96"),
        ({"intermediate_size": 48}, "mxfp4 experts must have a multiple of 32 as width, got 48"),
        ({"sliding_window": None}, "sliding_window must be positive where layers use sliding_attention"),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types must list 2 of"),
    ],
)
def test_sizes_and_layers_that_cannot_be(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError, match=field):
        spec_from_config(MXFP4 | changes)


def test_rope_is_stretched_unless_the_config_says_otherwise() -> None:
    """As transformers' config class has it."""
    spec = spec_from_config(FLOATS)
    rope = spec.attention.rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.truncate) == ("yarn", 32.0, 4096, False)
    assert rope.theta == 150000.0
    assert spec_from_config(FLOATS | {"rope_parameters": {"rope_type": "default"}}).attention.rope.kind == "default"
    assert [layer.window for layer in spec.layers] == [128, None]
