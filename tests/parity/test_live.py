"""The whole engine against transformers in torch: small checkpoints on disk, most of their experts offloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import ef_jax
from ef_jax.runtime.language_model import LanguageModel
from tests.nn import reference
from tests.parity.cases import CHUNK, FIXTURES, TOKENS
from tests.parity.families import FAMILIES, LIVE, RECORDED, Changes, case_ids

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NEW_TOKENS = 24


def load(path: Path, **options: Any) -> LanguageModel:
    return ef_jax.load(path, context=TOKENS + NEW_TOKENS, chunk=CHUNK, progress=False, **options)


def check_logits(model: Any, lm: LanguageModel, seed: int) -> None:
    """Our logits are torch's, and the experts were really fetched."""
    ids = np.random.default_rng(seed).integers(0, lm.spec.vocab, TOKENS)
    expected = reference.torch_logits(model, ids[None])[0]
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(lm.logits(ids), expected, atol=FAMILIES[lm.spec.family].tolerance, rtol=0)
    assert lm.stats.slots < lm.stats.experts
    assert sum(lm.stats.prefill.misses) > lm.stats.slots
    assert lm.stats.prefill.bytes_demand == sum(lm.stats.prefill.misses) * lm.spec.block_bytes


@pytest.mark.parametrize(("model_type", "seed", "changes"), LIVE, ids=case_ids(LIVE))
def test_logits(model_type: str, seed: int, changes: Changes, tmp_path: Path) -> None:
    model = reference.torch_model(model_type, seed, **changes)
    model.save_pretrained(tmp_path)
    check_logits(model, load(tmp_path, expert_fraction=0.25 if seed % 2 else 0.5), seed)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_sharded_checkpoint(model_type: str, tmp_path: Path) -> None:
    model = reference.torch_model(model_type, seed=7)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_logits(model, load(tmp_path, expert_fraction=0.25), seed=7)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_fused_checkpoint(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = reference.torch_model(model_type, seed=8)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()  # fused, as transformers 5 holds the experts
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    check_logits(model, load(tmp_path, expert_fraction=0.25), seed=8)


@pytest.mark.parametrize(
    ("model_type", "penalty"), [("qwen3_moe", 1.0), ("qwen2_moe", 1.0), ("mixtral", 1.1), ("olmoe", 1.0)]
)
def test_greedy_continuation(model_type: str, penalty: float, tmp_path: Path) -> None:
    """Two prompts of different lengths together, against one at a time in torch."""
    import torch

    model = reference.torch_model(model_type, seed=9)
    model.save_pretrained(tmp_path)
    random = np.random.default_rng(9)
    prompts = [random.integers(0, model.config.vocab_size, length) for length in (TOKENS, 7)]
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        expected.append(output[0, len(prompt) :].tolist())
    lm = load(tmp_path, expert_fraction=0.5, batch=2)
    outputs = lm.generate(prompts, max_new_tokens=NEW_TOKENS, repetition_penalty=penalty, ignore_eos=True)
    assert [output.tokens for output in outputs] == expected
    assert sum(lm.stats.decode.misses) > 0


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_logits_are_still_transformers(name: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = reference.torch_logits(model, expected["ids"].astype(np.int64)[None])[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=0)


def test_bundled_model_in_bfloat16_is_as_accurate_as_torch(small_moe: Path) -> None:
    """Both round: along the recorded text ours is no further from torch in float32 than torch in bfloat16 is."""
    import torch
    import transformers

    torch.set_num_threads(1)
    exact, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(small_moe, dtype=dtype, attn_implementation="eager").eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    lm = ef_jax.load(expert_fraction=0.5, context=96, chunk=32, progress=False)
    errors = []
    for prompt in json.loads((FIXTURES / "small_moe_greedy.json").read_text(encoding="utf-8"))["prompts"]:
        ids = np.asarray(prompt["ids"] + prompt["bfloat16"]["tokens"])
        expected, theirs = (reference.torch_logits(model, ids[None])[0] for model in (exact, rounded))
        errors.append([np.abs(logits - expected).mean() for logits in (lm.logits(ids), theirs)])
    ours, torchs = np.mean(errors, axis=0)
    assert ours < 1.1 * torchs
