"""gpt-oss as released, in MXFP4, which we keep: against transformers' model of the dequantized weights."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ef_jax.errors import CheckpointError
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.weights import open_checkpoint
from tests.checkpoints_tools.test_round_trip import assert_same_files, assert_same_weights, convert, convert_back
from tests.nn import reference
from tests.parity import engine

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

E, D, F = 6, 64, 96
SIZES = {"hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_hidden_layers": 2}
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
QUANTIZED = {"modules_to_not_convert": KEPT, "quant_method": "mxfp4"}
SEED = 5


def released_tensors(model: Any) -> dict[str, Any]:
    """The model's tensors under the names of the released checkpoints, its experts replaced by random ones in MXFP4;
    the model gets the same weights, dequantized by transformers."""
    random = np.random.default_rng(SEED)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        rows, contract = (2 * F, D) if name.endswith("gate_up_proj") else (D, F)
        blocks = torch.from_numpy(random.integers(0, 256, (E, rows, contract // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(random.integers(121, 126, (E, rows, contract // 32), dtype=np.uint8))
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.state_dict()[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    for name, tensor in model.state_dict().items():
        if name in tensors:
            tensor.copy_(tensors[name])  # rounded to bfloat16
    return tensors


def write_released(path: Path) -> Any:
    """A checkpoint with the released names and dtypes; the model that it stands for, in torch and float32."""
    model = reference.torch_model("gpt_oss", SEED, **SIZES)
    with torch.no_grad():
        tensors = released_tensors(model)
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads(model.config.to_json_string()) | {"quantization_config": QUANTIZED}
    config.pop("dtype", None)  # the released ones do not say it
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("gpt_oss") / "released"
    return path, write_released(path)


@pytest.fixture(scope="module")
def offloaded(released: tuple[Path, Any]) -> LanguageModel:
    return engine.load(released[0], expert_fraction=0.5, batch=2, prefetch=2, emulate_link="1GB/s", dtype="float32")


def test_logits_and_greedy_tokens_are_those_of_the_dequantized_model(
    released: tuple[Path, Any], offloaded: LanguageModel
) -> None:
    """In float32, which concerns the dense arrays and the biases alone. The bytes are counted as MXFP4's."""
    model = released[1]
    assert engine.logits_error(model, offloaded, SEED) < 2e-4
    prompts = engine.two_prompts(offloaded.spec.vocab, SEED)
    outputs = offloaded.generate(prompts, max_new_tokens=engine.NEW_TOKENS, ignore_eos=True)
    assert [output.tokens for output in outputs] == engine.greedy(model, prompts)


def test_blocks_are_mxfp4_on_the_host_and_in_the_slots(offloaded: LanguageModel) -> None:
    weights, biases = 3 * F * D * 17 // 32, (2 * F + D) * 4
    assert offloaded.spec.block_bytes == weights + biases
    assert offloaded.plan.host_bytes == offloaded.spec.total_experts * offloaded.spec.block_bytes
    pool = offloaded._engine.link.pool.array
    assert isinstance(pool, dict)
    assert sum(array[0].nbytes for array in jax.tree.leaves(pool)) == offloaded.spec.block_bytes
    assert pool["values"].dtype == np.uint8


def test_bits_are_those_of_the_all_resident_run(released: tuple[Path, Any]) -> None:
    """In bfloat16, as released."""
    offloaded, resident = (engine.load(released[0], expert_fraction=share) for share in (0.25, 1.0))
    assert offloaded.spec.dtype == "bfloat16"
    prompt = engine.two_prompts(offloaded.spec.vocab, SEED)[1]
    ours, theirs = (lm.logits(prompt) for lm in (offloaded, resident))
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    one, other = (lm.generate([prompt], max_new_tokens=8, ignore_eos=True)[0] for lm in (offloaded, resident))
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
    decode = offloaded.stats.decode
    assert decode.bytes_demand == sum(decode.misses) * offloaded.spec.block_bytes > 0
    assert resident.stats.decode.bytes_demand == 0


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_conversion_there_and_back(released: tuple[Path, Any], dtype: str | None, tmp_path: Path) -> None:
    """Another dtype changes the dense arrays and biases; blocks and scales stay as they are."""
    converted = convert(released[0], tmp_path / "converted", dtype)
    back = convert_back(converted, tmp_path / "back")
    if dtype is None:
        assert_same_weights(released[0], converted)
        assert_same_files(released[0], back)
        return
    with open_checkpoint(back) as checkpoint:
        assert (checkpoint.spec.dtype, checkpoint.spec.experts.quantization) == ("float32", "mxfp4")
    assert_same_weights(back, converted)


def changed(path: Path, source: Path, change: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors") | change, path / "model.safetensors")
    return path


def test_scales_that_are_nan_are_refused(released: tuple[Path, Any], tmp_path: Path) -> None:
    scales = torch.full((E, D, F // 32), 120, dtype=torch.uint8)
    scales[3, 5, 1] = 255
    path = changed(tmp_path / "nan", released[0], {"model.layers.1.mlp.experts.down_proj_scales": scales})
    with open_checkpoint(path) as checkpoint:
        form = checkpoint.spec.block_format
        block = np.empty(form.shape, form.dtype)
        checkpoint.read_block(1, 2, block)
        with pytest.raises(CheckpointError, match=r"layer 1 expert 3 .* NaN"):
            checkpoint.read_block(1, 3, block)


def test_blocks_that_are_no_bytes_are_refused(released: tuple[Path, Any], tmp_path: Path) -> None:
    blocks = torch.zeros((E, D, F // 32, 16), dtype=torch.bfloat16)
    path = changed(tmp_path / "floats", released[0], {"model.layers.1.mlp.experts.down_proj_blocks": blocks})
    for dtype in (None, "float32"):
        with pytest.raises(CheckpointError, match=r"experts\.down_proj_blocks' is stored as BF16, MXFP4 is U8"):
            open_checkpoint(path, dtype)
