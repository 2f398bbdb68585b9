"""Checkpoints of FP8 weights, as DeepSeek-V3 is released: read, converted, refused."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints_tools import convert_to_huggingface, convert_to_orbax
from checkpoints_tools.cli import main
from ef_jax.errors import CheckpointError, UnsupportedError
from ef_jax.families import Fp8Blocks, spec_from_config
from ef_jax.weights import open_checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from ef_jax.weights.layout import Layout
from tests.released import read_config
from tests.weights.synthetic import DTYPES, same_bits

BLOCKS = Fp8Blocks(rows=16, columns=8)
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
QUANTIZED = CONFIG | {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCKS.rows, BLOCKS.columns],
        "activation_scheme": "dynamic",
    }
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


def is_quantized(name: str) -> bool:
    return name.endswith(("_proj.weight", "_with_mqa.weight"))


def checkpoints(scale_dtype: Any = np.float32) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of the FP8 checkpoint, and of the same model in bfloat16, one element at a time."""
    random = np.random.default_rng(0)
    quantized, plain = {}, {}
    for name, (shape, dtype) in Layout(spec_from_config(CONFIG), "per_expert").tensors().items():
        values = random.standard_normal(shape).astype(np.float32)
        if not is_quantized(name):
            quantized[name] = plain[name] = values.astype(dtype or ml_dtypes.bfloat16)
            continue
        quantized[name] = (values * 100).astype(ml_dtypes.float8_e4m3fn)
        scales = (random.random(BLOCKS.scales_of(shape)) * 3e-3).astype(scale_dtype)
        quantized[f"{name}_scale_inv"] = scales
        scales = scales.astype(np.float32)
        row, column = np.indices(shape)
        of_element = scales[row // BLOCKS.rows, column // BLOCKS.columns]
        plain[name] = (quantized[name].astype(np.float32) * of_element).astype(ml_dtypes.bfloat16)
    for name in ("eh_proj.weight", "eh_proj.weight_scale_inv", "shared_head.norm.weight"):
        quantized[f"model.layers.2.{name}"] = np.ones((16, 8), np.float32)  # predicts a second token: not read
    return quantized, plain


def write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):  # so that a weight and its scales lie in different files
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, directory / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def assert_same_weights(left: Path, right: Path, dtype: str | None = None) -> None:
    with open_checkpoint(left, dtype) as one, open_checkpoint(right) as other:
        ours, theirs = dict(one.dense()), dict(other.dense())
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[name], theirs[name]) for name in ours)
        blocks = [np.empty(one.spec.block_shape, DTYPES[one.spec.dtype]) for _ in range(2)]
        for expert in range(4):
            for checkpoint, block in zip((one, other), blocks, strict=True):
                checkpoint.read_block(1, expert, block)
            assert same_bits(*blocks)


@pytest.mark.parametrize(
    ("shards", "strip", "scale_dtype"),
    [
        (1, 4 << 20, np.float32),
        (3, 100, np.float32),
        (1, 100, ml_dtypes.float8_e8m0fnu),
        (1, 100, ml_dtypes.bfloat16),
    ],
)
def test_dequantized_as_written_down(
    tmp_path: Path, shards: int, strip: int, scale_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ef_jax.weights.huggingface._STRIP_BYTES", strip)
    quantized, plain = checkpoints(scale_dtype)
    source = write(tmp_path / "fp8", QUANTIZED, quantized, shards)
    assert_same_weights(source, write(tmp_path / "plain", CONFIG, plain))
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.spec.dtype == "bfloat16"
        read = [array.nbytes for name, array in quantized.items() if not name.startswith("model.layers.2.")]
        assert checkpoint.nbytes == sum(read)


def test_a_wider_dtype_rounds_nothing(tmp_path: Path) -> None:
    quantized, _ = checkpoints()
    exact = {}
    for name, array in quantized.items():
        if f"{name}_scale_inv" in quantized:
            row, column = np.indices(array.shape)
            scales = quantized[f"{name}_scale_inv"][row // BLOCKS.rows, column // BLOCKS.columns]
            exact[name] = array.astype(np.float32) * scales
        elif not name.endswith("_scale_inv") and not name.startswith("model.layers.2."):
            exact[name] = array.astype(np.float32)
    source = write(tmp_path / "fp8", QUANTIZED, quantized)
    assert_same_weights(source, write(tmp_path / "exact", CONFIG | {"torch_dtype": "float32"}, exact), dtype="float32")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_conversion_is_in_bfloat16_and_so_is_the_way_back(
    tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, plain = checkpoints()
    source = write(tmp_path / "fp8", QUANTIZED, quantized, shards)
    assert main([str(source), str(tmp_path / "converted"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dequantized"] == "fp8 to bfloat16"
    assert_same_weights(tmp_path / "converted", source)
    with open_checkpoint(tmp_path / "converted") as checkpoint:
        assert isinstance(checkpoint, ConvertedCheckpoint)
        convert_to_huggingface(checkpoint, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert_same_weights(tmp_path / "back", write(tmp_path / "plain", CONFIG, plain))
    with open_checkpoint(tmp_path / "back") as back:
        assert isinstance(back, HuggingFaceCheckpoint)
        assert {name for file in back.files.values() for name in file.tensors} == plain.keys()
        assert back.files.keys() == {path.name for path in source.glob("*.safetensors")}
        assert convert_to_orbax(back, tmp_path / "again").complete
    assert_same_weights(tmp_path / "again", source)


def damaged(what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config, (tensors, _) = dict(QUANTIZED), checkpoints()
    scales = tensors[f"{DOWN}_scale_inv"]
    if what == "missing":
        del tensors[f"{DOWN}_scale_inv"]
    elif what == "shape":
        tensors[f"{DOWN}_scale_inv"] = scales[:1]
    elif what == "dtype":
        tensors[f"{DOWN}_scale_inv"] = scales.astype(np.float64)
    elif what == "nan scale":
        scales[1, 1] = np.nan
    elif what == "nan":
        tensors[DOWN].view(np.uint8)[3, 3] = 0x7F
    elif what == "not described":
        del config["quantization_config"]
    elif what == "of a plain weight":
        tensors["lm_head.weight_scale_inv"] = np.ones((3, 4), np.float32)
    return config, tensors


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"experts\.2\.down_proj\.weight' is FP8, but its scales .*_scale_inv' are missing"),
        (
            "shape",
            r"_scale_inv' are F32 \[1, 2\], but \[32, 16\] in blocks of 16 x 8 needs F32 or .* \[2, 2\]",
        ),
        ("dtype", r"_scale_inv' are F64 \[2, 2\]"),
        ("nan scale", r"experts\.2\.down_proj\.weight_scale_inv' of .* holds NaN"),
        ("nan", r"experts\.2\.down_proj\.weight' of .* holds NaN in FP8"),
        ("not described", r"is FP8, but config.json has no quantization_config of quant_method 'fp8'"),
        ("of a plain weight", r"no use for: 1 tensor: 'lm_head\.weight_scale_inv'"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, what: str, message: str) -> None:
    directory = write(tmp_path / "fp8", *damaged(what))

    def read() -> None:
        with open_checkpoint(directory) as checkpoint:
            checkpoint.read_block(1, 2, np.empty(checkpoint.spec.block_shape, ml_dtypes.bfloat16))

    with pytest.raises(CheckpointError, match=message) as raised:
        read()
    assert "\n" not in str(raised.value)


def test_families_that_are_released_in_fp8_and_what_else_is_refused_by_name() -> None:
    for method in ("compressed-tensors", "gptq", "mxfp4"):
        with pytest.raises(UnsupportedError, match=f"quantization_config is .*{method}"):
            spec_from_config(CONFIG | {"quantization_config": {"quant_method": method}})
    for name in ("deepseek-v3", "kimi-k2-instruct", "minimax-m2", "qwen3-30b-a3b"):
        config = read_config(name) | {"quantization_config": QUANTIZED["quantization_config"]}
        assert spec_from_config(config).dtype == "bfloat16"
    with pytest.raises(UnsupportedError, match="quantization_config"):
        spec_from_config(QUANTIZED | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_dequantizes_to_the_same_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate alone")
    import transformers

    quantized, _ = checkpoints()
    source = write(tmp_path / "fp8", QUANTIZED, quantized)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    layer = model.model.layers[1]
    with open_checkpoint(source) as checkpoint:
        dense = dict(checkpoint.dense())
        block = np.empty(checkpoint.spec.block_shape, ml_dtypes.bfloat16)
        checkpoint.read_block(1, 3, block)

    def theirs(tensor: Any) -> np.ndarray:
        found: np.ndarray = tensor.detach().float().numpy()
        return found

    gate_up, down = theirs(layer.mlp.experts.gate_up_proj[3]), theirs(layer.mlp.experts.down_proj[3])
    expected = np.stack([*np.split(gate_up, 2), down.T])
    np.testing.assert_array_equal(block.astype(np.float32), expected)
    o_proj = dense["layers.1.attn.o_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(o_proj, theirs(layer.self_attn.o_proj.weight))
