"""Llama 4 as released: a language model inside a model that sees, with a config and tensors of both."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers
from safetensors.numpy import load_file

import ef_jax
from ef_jax.errors import UnsupportedError
from ef_jax.families import spec_from_config
from ef_jax.runtime.language_model import LanguageModel
from tests.checkpoints_tools.test_round_trip import assert_same_weights, convert, convert_back
from tests.nn import reference
from tests.parity.cases import CHUNK, TOKENS
from tests.parity.families import llama4_text

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXT = llama4_text.SIZES | {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2}

VISION = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
}

IDS = np.random.default_rng(4).integers(0, 48, TOKENS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The whole model in torch, and where it is saved."""
    torch.manual_seed(4)
    config = transformers.AutoConfig.for_model(
        "llama4", text_config=TEXT, vision_config=VISION, attn_implementation="eager"
    )
    model = reference.randomized(transformers.AutoModelForImageTextToText.from_config(config).eval())
    path = tmp_path_factory.mktemp("llama4")
    model.save_pretrained(path)
    return model, path


def load(path: Path, **options: Any) -> LanguageModel:
    return ef_jax.load(path, context=TOKENS, chunk=CHUNK, progress=False, **options)


def test_logits(saved: tuple[Any, Path], caplog: pytest.LogCaptureFixture) -> None:
    model, path = saved
    with caplog.at_level(logging.INFO, logger="ef_jax"):
        lm = load(path, expert_fraction=0.5)
    assert "vision_model." in caplog.text
    expected = reference.torch_logits(model, IDS[None])[0]
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(lm.logits(IDS), expected, atol=2e-4, rtol=0)
    assert sum(lm.stats.prefill.misses) > lm.stats.slots < lm.stats.experts


def test_bits_of_scaled_inputs_do_not_depend_on_where_experts_are(saved: tuple[Any, Path]) -> None:
    """In bfloat16, where the product of a row and its weight is rounded."""
    _, path = saved
    continued = []
    for fraction in (0.5, 1.0):
        lm = load(path, dtype="bfloat16", expert_fraction=fraction)
        logits = lm.logits(IDS)
        output = lm.generate([IDS[:9]], max_new_tokens=20, ignore_eos=True)[0]
        continued.append((logits.view(np.uint32).tolist(), output.tokens, output.logprobs))
    assert continued[0] == continued[1]


def test_a_conversion_keeps_the_language_model(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = saved
    converted = convert(path, tmp_path / "converted")
    assert_same_weights(path, converted)
    back = load_file(convert_back(converted, tmp_path / "back") / "model.safetensors")
    given = load_file(path / "model.safetensors")
    assert back.keys() == {name for name in given if name.startswith("language_model.")}
    for name, array in back.items():
        np.testing.assert_array_equal(array, given[name])


@pytest.mark.parametrize("outer", [True, False])
def test_unknown_fields_are_named_in_either_config(saved: tuple[Any, Path], outer: bool) -> None:
    config = json.loads((saved[1] / "config.json").read_text(encoding="utf-8"))
    assert spec_from_config(config).family == "llama4"
    (config if outer else config["text_config"])["oddity"] = 1
    with pytest.raises(UnsupportedError, match="oddity"):
        spec_from_config(config)
