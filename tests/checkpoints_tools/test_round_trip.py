import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints_tools import convert_to_huggingface, convert_to_orbax
from checkpoints_tools.cli import main
from ef_jax.errors import CheckpointError
from ef_jax.weights import open_checkpoint
from ef_jax.weights.converted import ConvertedCheckpoint, layer_dir
from ef_jax.weights.huggingface import HuggingFaceCheckpoint
from tests.weights.synthetic import CONFIGS, DTYPES, random_tensors, same_bits, write_checkpoint

CASES = [(family, fused, shards) for family in CONFIGS for fused, shards in ((False, 1), (False, 3), (True, 2))]


def convert(source: Path, destination: Path, dtype: str | None = None) -> Path:
    with open_checkpoint(source, dtype) as checkpoint:
        assert isinstance(checkpoint, HuggingFaceCheckpoint)
        assert convert_to_orbax(checkpoint, destination, dtype).complete
    return destination


def convert_back(source: Path, destination: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        assert isinstance(checkpoint, ConvertedCheckpoint)
        convert_to_huggingface(checkpoint, destination)
    return destination


def assert_same_files(left: Path, right: Path) -> None:
    assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
    for path in left.iterdir():
        assert path.read_bytes() == (right / path.name).read_bytes(), path.name


def assert_same_weights(left: Path, right: Path) -> None:
    with open_checkpoint(left) as one, open_checkpoint(right) as other:
        assert one.spec == other.spec
        ours, theirs = dict(one.dense()), dict(other.dense())
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[name], theirs[name]) for name in ours)
        form = one.spec.block_format
        blocks = [np.empty(form.shape, form.dtype) for _ in range(2)]
        for layer in one.spec.moe_layers:
            for expert in range(one.spec.experts.count):
                one.read_block(layer, expert, blocks[0])
                other.read_block(layer, expert, blocks[1])
                assert same_bits(blocks[0], blocks[1])


@pytest.mark.parametrize(("family", "fused", "shards"), CASES)
def test_there_and_back_gives_the_same_files(tmp_path: Path, family: str, fused: bool, shards: int) -> None:
    config = CONFIGS[family]
    original = write_checkpoint(tmp_path / "original", config, random_tensors(config, fused), shards)
    converted = convert(original, tmp_path / "converted")
    assert_same_weights(original, converted)
    with open_checkpoint(converted) as checkpoint:
        assert 1 in checkpoint.spec.eos_ids, "only generation_config.json names it"
    assert_same_files(original, convert_back(converted, tmp_path / "back"))


def test_the_bundled_model_there_and_back(small_moe: Path, tmp_path: Path) -> None:
    converted = convert(small_moe, tmp_path / "converted")
    assert_same_weights(small_moe, converted)
    back = convert_back(converted, tmp_path / "back")
    for path in back.iterdir():
        assert path.read_bytes() == (small_moe / path.name).read_bytes(), path.name
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in back.iterdir()}
    with open_checkpoint(converted) as checkpoint:
        assert isinstance(checkpoint, ConvertedCheckpoint)
        assert checkpoint.format == "converted"
        assert checkpoint.nbytes == 22_323_072
        assert checkpoint.tokenizer_dir == converted / "source"
        assert checkpoint.generation_config["temperature"] == 0.8
        assert checkpoint.reader == "raw"


def test_tensors_without_weights_come_back(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"] | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.array([np.inf, 2], np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    original = write_checkpoint(tmp_path / "original", config, tensors, 2)
    converted = convert(original, tmp_path / "converted")
    assert main([str(converted), "--verify"]) == 0
    assert_same_files(original, convert_back(converted, tmp_path / "back"))


@pytest.mark.parametrize("shards", [1, 2])
def test_converting_the_dtype(tmp_path: Path, shards: int) -> None:
    config = CONFIGS["qwen2_moe"]
    tensors = random_tensors(config)
    original = write_checkpoint(tmp_path / "original", config, tensors, shards)
    converted = convert(original, tmp_path / "converted", "float32")
    back = convert_back(converted, tmp_path / "back")
    assert_same_weights(converted, back)
    written: dict[str, Any] = {}
    for path in back.glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == tensors.keys()
    assert all(same_bits(written[name], tensors[name].astype(np.float32)) for name in tensors)
    assert json.loads((back / "config.json").read_text()) == config | {"dtype": "float32"}
    if shards > 1:
        index = json.loads((back / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in written.values())
    with pytest.raises(CheckpointError, match="was converted to float32: convert the original with --dtype bfloat16"):
        open_checkpoint(converted, "bfloat16")


def test_orbax_reads_a_layer_on_its_own(tmp_path: Path) -> None:
    from orbax.checkpoint.experimental import v1 as ocp

    config = CONFIGS["olmoe"] | {"dtype": "float32"}
    tensors = random_tensors(config)
    converted = convert(write_checkpoint(tmp_path / "original", config, tensors), tmp_path / "converted")
    targets = {f"{expert:05d}": np.empty((3, 8, 16), np.float32) for expert in range(4)}
    layer = ocp.load(layer_dir(converted, 1), targets)
    names = [f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up", "down")]
    gate, up, down = (tensors[name] for name in names)
    assert same_bits(layer["00002"], np.stack([gate, up, down.T]))


def test_a_layer_stored_in_another_way_is_read_through_orbax(tmp_path: Path) -> None:
    from orbax.checkpoint.experimental import v1 as ocp

    config = CONFIGS["mixtral"]
    original = write_checkpoint(tmp_path / "original", config, random_tensors(config))
    converted = convert(original, tmp_path / "converted")
    layer = layer_dir(converted, 0)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    names = [f"{expert:05d}" for expert in range(4)]
    arrays = ocp.load(layer, {name: np.empty((3, 8, 16), DTYPES["bfloat16"]) for name in names})
    layer.rename(tmp_path / "before")
    with context:
        ocp.save(layer, {name: np.asarray(array) for name, array in arrays.items()})
    with open_checkpoint(converted) as checkpoint:
        assert isinstance(checkpoint, ConvertedCheckpoint)
        block = np.empty((3, 8, 16), DTYPES["bfloat16"])
        with pytest.warns(UserWarning, match="is not stored raw"):
            checkpoint.read_block(0, 3, block)
        assert checkpoint.reader == "orbax"
    assert same_bits(block, np.asarray(arrays["00003"]))
