import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ef_jax.errors import CheckpointError, InputError, UnsupportedError
from ef_jax.weights import Checkpoint, open_checkpoint
from ef_jax.weights.huggingface import HuggingFaceCheckpoint, copy_rows
from tests.weights.synthetic import CONFIGS, DTYPES, random_tensors, same_bits, write_checkpoint

CONFIG = CONFIGS["qwen3_moe"]
CASES = [(family, fused) for family in CONFIGS for fused in (False, True)]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(CONFIG)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def read_blocks(checkpoint: Checkpoint) -> dict[tuple[int, int], np.ndarray]:
    spec = checkpoint.spec
    blocks = {}
    for layer in spec.moe_layers:
        for expert in range(spec.experts.count):
            block = np.empty(spec.block_shape, DTYPES[spec.dtype])
            checkpoint.read_block(layer, expert, block)
            blocks[layer, expert] = block
    return blocks


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_weights_arrive_in_their_places(directory: Path, family: str, fused: bool) -> None:
    config = CONFIGS[family]
    tensors = random_tensors(config, fused)
    write_checkpoint(directory, config, tensors, shards=3)
    with open_checkpoint(directory) as checkpoint:
        dense = dict(checkpoint.dense())
        blocks = read_blocks(checkpoint)
    assert checkpoint.format == "huggingface"
    assert checkpoint.nbytes == sum(array.nbytes for array in tensors.values())
    assert checkpoint.tokenizer_dir == directory
    assert checkpoint.generation_config == {"eos_token_id": 1}

    attention = "model.layers.1.self_attn"
    qkv = np.concatenate([tensors[f"{attention}.{name}_proj.weight"] for name in "qkv"])
    assert same_bits(dense["layers.1.attn.qkv_proj.weight"], qkv)
    assert same_bits(dense["layers.1.attn.o_proj.weight"], tensors[f"{attention}.o_proj.weight"])
    assert same_bits(dense["embed.weight"], tensors["model.embed_tokens.weight"])
    assert same_bits(dense["head.weight"], tensors["lm_head.weight"])
    if family == "qwen2_moe":
        bias = np.concatenate([tensors[f"{attention}.{name}_proj.bias"] for name in "qkv"])
        assert same_bits(dense["layers.1.attn.qkv_proj.bias"], bias)
        shared = [tensors[f"model.layers.1.mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")]
        assert same_bits(dense["layers.1.shared.block"], np.stack([shared[0], shared[1], shared[2].T]))
    moe = "model.layers.1.block_sparse_moe" if family == "mixtral" and not fused else "model.layers.1.mlp"
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert in range(4):
        if fused:
            gate, up = np.split(tensors[f"{moe}.experts.gate_up_proj"][expert], 2)
            down = tensors[f"{moe}.experts.down_proj"][expert]
        else:
            gate, up, down = (tensors[f"{moe}.experts.{expert}.{name}.weight"] for name in names)
        assert same_bits(blocks[1, expert], np.stack([gate, up, down.T]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_converts_every_weight(
    directory: Path, tensors: dict[str, np.ndarray], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Strips of one row, so that joining them is tested too.
    monkeypatch.setattr("ef_jax.weights.huggingface._STRIP_BYTES", 32)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32)
    write_checkpoint(directory, CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' is stored as F32, config"):
        open_checkpoint(directory)
    with open_checkpoint(directory, dtype) as checkpoint:
        assert checkpoint.spec.dtype == dtype
        dense, blocks = dict(checkpoint.dense()), read_blocks(checkpoint)
    assert same_bits(dense["embed.weight"], tensors["model.embed_tokens.weight"].astype(DTYPES[dtype]))
    names = [f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up", "down")]
    gate, up, down = (tensors[name].astype(DTYPES[dtype]) for name in names)
    assert same_bits(blocks[1, 2], np.stack([gate, up, down.T]))


@pytest.mark.parametrize("shape", [(1, 1), (31, 5), (32, 7), (65, 33)])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_copy_rows_transposes(shape: tuple[int, int], dtype: Any) -> None:
    source = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    target = np.empty(shape[::-1], dtype)
    copy_rows(source, target.T)
    assert same_bits(target, source.T)


def test_rotary_buffers_and_a_tied_heads_copy_are_accepted(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_checkpoint(directory, CONFIG | {"tie_word_embeddings": True}, tensors)
    with open_checkpoint(directory) as checkpoint:
        assert isinstance(checkpoint, HuggingFaceCheckpoint)
        assert checkpoint.extra == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
        assert "head.weight" not in dict(checkpoint.dense())


def test_a_tied_head_that_differs(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, CONFIG | {"tie_word_embeddings": True}, tensors)
    with open_checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match="differs from the embedding"):
        list(checkpoint.dense())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(directory: Path, tensors: dict[str, np.ndarray], value: float) -> None:
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = value
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = value
    write_checkpoint(directory, CONFIG, tensors)
    with open_checkpoint(directory) as checkpoint:
        with pytest.raises(CheckpointError, match=r"layer 1 expert 3 of .* holds NaN or infinite weights"):
            read_blocks(checkpoint)
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj.* holds NaN or infinite weights"):
            list(checkpoint.dense())


def test_a_value_that_overflows_the_dtype_asked_for(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"][0] = 1e30
    write_checkpoint(directory, CONFIG, tensors)
    message = r"'model.norm.weight' of .* infinite weights in float16"
    with open_checkpoint(directory, "float16") as checkpoint, pytest.raises(CheckpointError, match=message):
        list(checkpoint.dense())


def test_misuse_of_read_block(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, CONFIG, tensors)
    with open_checkpoint(directory) as checkpoint:
        block = np.empty(checkpoint.spec.block_shape, DTYPES["bfloat16"])
        for layer, expert, out, message in (
            (0, 0, block, r"layer 0 has no experts; the layers that do are \(1,\)"),
            (-1, 0, block, "layer -1 has no experts"),
            (1, 4, block, "expert 4 is not below 4"),
            (1, 0, block[:2], r"a block is a contiguous bfloat16 array \[3, 8, 16\]"),
            (1, 0, block.astype(np.float32), "got float32"),
            (1, 0, np.empty((16, 8, 3), block.dtype).T, "contiguous"),
        ):
            with pytest.raises(InputError, match=message):
                checkpoint.read_block(layer, expert, out)


def remove(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def add_many(tensors: dict[str, np.ndarray]) -> None:
    tensors |= {f"model.visual.{number:02d}": np.ones(1, np.float32) for number in range(12)}


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(4, 4)


def quantize(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"lacks 1 tensor: 'model.layers.1.mlp.experts.3.up_proj.weight'"),
        (add_many, r"no use for: 12 tensors: 'model.visual.00', .*'model.visual.09' and 2 more"),
        (reshape, r"'model.norm.weight' has shape \[4, 4\], config.json needs \[16\]"),
        (quantize, "'lm_head.weight' is stored as I8; only float weights"),
    ],
)
def test_tensors_that_do_not_fit(directory: Path, tensors: dict[str, np.ndarray], spoil: Any, message: str) -> None:
    spoil(tensors)
    write_checkpoint(directory, CONFIG, tensors)
    for dtype in (None, "float32"):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(directory, dtype)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../stolen.safetensors", "only .safetensors files beside it are read"),
        ("/etc/passwd", "only .safetensors files beside it are read"),
        ("..", "only .safetensors files beside it are read"),
        ("pytorch_model.bin", "only .safetensors files beside it are read"),
        ("a\\b.safetensors", "only .safetensors files beside it are read"),
        ("a\0.safetensors", "only .safetensors files beside it are read"),
        (3, "only .safetensors files beside it are read"),
        ("absent.safetensors", "lacks 'absent.safetensors', which its index names"),
        ("model-00001-of-00002.safetensors", "its index and its shards disagree"),
    ],
)
def test_an_index_that_names_what_it_must_not(
    directory: Path, tensors: dict[str, np.ndarray], name: object, message: str
) -> None:
    write_checkpoint(directory, CONFIG, tensors, shards=2)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = next(tensor for tensor, shard in index["weight_map"].items() if "model-00002" in shard)
    index["weight_map"][moved] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\ufeff{", '{"a": '])
def test_an_index_that_is_none(directory: Path, tensors: dict[str, np.ndarray], text: str) -> None:
    write_checkpoint(directory, CONFIG, tensors, shards=2)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json' (is not valid JSON|holds list|has no weight_map)"):
        open_checkpoint(directory)


def test_a_shard_missing_or_truncated(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, CONFIG, tensors, shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"00002\.safetensors' is truncated"):
        open_checkpoint(directory)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks 'model-00002-of-00002.safetensors', which its index names"):
        open_checkpoint(directory)


def test_symlinked_files_as_in_the_hub_cache(directory: Path, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_checkpoint(directory, CONFIG, tensors)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in directory.iterdir():
        (snapshot / file.name).symlink_to(file)
    with open_checkpoint(snapshot) as checkpoint:
        assert len(dict(checkpoint.dense())) > 0


def test_pickled_weights_are_refused(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, CONFIG, tensors)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only 'pytorch_model.bin': pickled weights are never loaded"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(directory)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        open_checkpoint("Qwen/Qwen3-30B-A3B")
    with pytest.raises(CheckpointError, match=r"holds neither config.json nor manifest.json"):
        open_checkpoint(tmp_path)
    for path in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match=r"there is no directory|cannot open"):
            open_checkpoint(path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(InputError, match="dtype 'int4' is not one of"):
        open_checkpoint(tmp_path, "int4")


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(directory: Path, tensors: dict[str, np.ndarray], name: str, text: bytes) -> None:
    write_checkpoint(directory, CONFIG, tensors)
    (directory / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"{name}' (is not valid JSON|holds list, expected a JSON object)"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "of_config", "of_both"),
    [
        (2, [1, 2, 0], (2,), (2, 1, 0)),
        (None, 5, (), (5,)),
        ([3, 4], None, (3, 4), (3, 4)),
        (50_279, 50_279, (50_279,), (50_279,)),  # as transformers writes a small model with its family's default
    ],
)
def test_texts_end_where_either_config_says(
    directory: Path,
    tensors: dict[str, np.ndarray],
    in_config: object,
    in_generation: object,
    of_config: tuple[int, ...],
    of_both: tuple[int, ...],
) -> None:
    write_checkpoint(directory, CONFIG | {"eos_token_id": in_config}, tensors)
    fields = {"eos_token_id": in_generation, "temperature": 0.6, "pad_token_id": -1}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.spec.eos_ids == of_both
        assert checkpoint.generation_config == fields
    (directory / "generation_config.json").unlink()
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.spec.eos_ids == of_config
        assert checkpoint.generation_config == {}


@pytest.mark.parametrize("eos", [64, -1, True, 1.0, "1", {"id": 1}, [[1]], [1, None], [1, 64]])
def test_an_end_of_text_id_that_is_none(directory: Path, tensors: dict[str, np.ndarray], eos: object) -> None:
    write_checkpoint(directory, CONFIG, tensors)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    message = rf"generation_config\.json': eos_token_id must be token ids from 0 to 63, got {re.escape(repr(eos))}"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_an_unknown_architecture(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, CONFIG | {"model_type": "llama"}, tensors)
    with pytest.raises(UnsupportedError, match="llama"):
        open_checkpoint(directory)


def test_the_bundled_model(small_moe: Path) -> None:
    with open_checkpoint(small_moe) as checkpoint:
        shapes = {name: array.shape for name, array in checkpoint.dense()}
        assert shapes["embed.weight"] == (4096, 192)
        assert shapes["layers.7.attn.qkv_proj.weight"] == (384, 192)
        assert checkpoint.spec.block_shape == (3, 64, 192)
        block = np.empty(checkpoint.spec.block_shape, DTYPES["bfloat16"])
        checkpoint.read_block(7, 31, block)
        assert 0 < np.abs(block.astype(np.float32)).mean() < 1
