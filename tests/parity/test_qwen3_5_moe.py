"""Qwen3.5-MoE as released, its language model beside a vision tower: names, what is left out, rotary positions."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import save_file

from ef_jax import nn
from ef_jax.families import spec_from_config
from ef_jax.weights import open_checkpoint
from tests.checkpoints_tools.test_round_trip import assert_same_weights, convert, convert_back
from tests.nn import reference
from tests.parity import engine
from tests.parity.families import _delta_net, qwen3_5_moe_text

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SEED = 3
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Our arrays but the experts."""
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(array) for name, array in checkpoint.dense()}


class Released:
    """A random model with its vision tower, saved as the released ones are: fused experts, layers of more tokens."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.path = path
        text = reference.torch_model("qwen3_5_moe_text", SEED, rope_parameters=qwen3_5_moe_text.STREAMS)
        sizes = text.config.to_dict()
        config = transformers.AutoConfig.for_model(
            "qwen3_5_moe", text_config=sizes, vision_config=dict(VISION), attn_implementation="eager"
        )
        self.model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        self.model.model.language_model.load_state_dict(text.model.state_dict())
        self.model.lm_head.load_state_dict(text.lm_head.state_dict())
        self.text, self.config = text, json.loads(self.model.config.to_json_string())
        self.config["text_config"] |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mlp_only_layers": []}
        self.config["text_config"] |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
        self.tensors = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
        self.tensors["mtp.layers.0.input_layernorm.weight"] = np.ones(32, np.float32)
        self.write(path, self.tensors, self.config)

    @staticmethod
    def write(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        path.mkdir(exist_ok=True)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(tmp_path_factory.mktemp("released"))


def test_logits_are_those_of_the_whole_model(released: Released) -> None:
    assert any(name.startswith("model.visual.") for name in released.tensors)
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in released.tensors
    lm = engine.load_offloaded(released.path, SEED)
    assert lm.spec.family == "qwen3_5_moe"
    assert engine.logits_error(released.model, lm, SEED) <= _delta_net.TOLERANCE


def test_weights_are_those_of_the_language_model_alone(released: Released, tmp_path: Path) -> None:
    """Without what the language model does not use, also through a conversion and back."""
    back = convert_back(convert(released.path, tmp_path / "converted"), tmp_path / "back")
    assert_same_weights(released.path, back)
    spec = spec_from_config(released.config)
    released.text.save_pretrained(tmp_path / "text")
    ours, theirs = (arrays_of(path) for path in (back, tmp_path / "text"))
    assert spec.layers == spec_from_config(released.text.config.to_dict()).layers
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_decays_and_norms_are_kept_in_float32_where_they_are_stored_so(released: Released, tmp_path: Path) -> None:
    text = released.config["text_config"] | {"dtype": "bfloat16"}
    config = released.config | {"dtype": "bfloat16", "text_config": text}
    kept = ("A_log", "linear_attn.norm.weight")
    tensors = {
        name: array if name.endswith(kept) else array.astype(ml_dtypes.bfloat16)
        for name, array in released.tensors.items()
    }
    Released.write(tmp_path / "mixed", tensors, config)
    arrays = arrays_of(tmp_path / "mixed")
    assert arrays["layers.0.attn.in_proj.weight"].dtype == ml_dtypes.bfloat16
    for ours, theirs in (("a_log", "A_log"), ("norm", "norm.weight"), ("dt_bias", "dt_bias")):
        stored = tensors[f"model.language_model.layers.0.linear_attn.{theirs}"]
        assert arrays[f"layers.0.attn.{ours}"].dtype == np.float32
        np.testing.assert_array_equal(arrays[f"layers.0.attn.{ours}"], stored.astype(np.float32))
    back = convert_back(convert(tmp_path / "mixed", tmp_path / "converted"), tmp_path / "back")
    assert_same_weights(tmp_path / "mixed", back)


def test_three_equal_streams_of_positions_are_plain_rope() -> None:
    import torch
    import transformers
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    config = transformers.AutoConfig.for_model("qwen3_5_moe_text", head_dim=256, rope_parameters=rope)
    positions = np.array([[0, 1, 7, 100]], np.int32)
    streams = torch.from_numpy(positions)[None].expand(3, -1, -1)
    cos, sin = Qwen3_5MoeTextRotaryEmbedding(config)(torch.zeros(1), streams)
    plain = spec_from_config(json.loads(config.to_json_string())).attention.rope
    for ours, theirs in zip(nn.rope_tables(plain, jnp.asarray(positions)), (cos, sin), strict=True):
        np.testing.assert_allclose(np.concatenate([ours, ours], axis=-1), theirs.numpy(), atol=1e-5)
