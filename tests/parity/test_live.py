"""The whole engine against transformers in torch: small checkpoints on disk, most of their experts offloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import ef_jax
from tests.nn import reference
from tests.parity import engine, grades
from tests.parity.cases import FIXTURES
from tests.parity.families import FAMILIES, LIVE, RECORDED, Changes, case_ids

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def check_logits(model: Any, path: Path, seed: int) -> float:
    """Returns how far the logits are from transformers'; raises where that is farther than the table of grades says."""
    lm = engine.load_offloaded(path, seed)
    error, family = engine.logits_error(model, lm, seed), lm.spec.family
    assert error <= FAMILIES[family].tolerance
    assert error <= grades.bound(family), "worse than the README says"
    return error


@pytest.mark.parametrize(("model_type", "seed", "changes"), LIVE, ids=case_ids(LIVE))
def test_logits(model_type: str, seed: int, changes: Changes, tmp_path: Path, grade: grades.Grade) -> None:
    model = engine.save_model(tmp_path, model_type, seed, changes)
    grade(model_type, "logits", check_logits(model, tmp_path, seed))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_sharded_checkpoint(model_type: str, tmp_path: Path) -> None:
    model = engine.save_model(tmp_path, model_type, 7, {}, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_logits(model, tmp_path, seed=7)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_fused_checkpoint(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = reference.torch_model(model_type, seed=8)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()  # fused, as transformers 5 holds the experts
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    check_logits(model, tmp_path, seed=9)


def test_greedy_continuation_with_a_repetition_penalty(tmp_path: Path) -> None:
    model = engine.save_model(tmp_path, "mixtral", 9, {})
    prompts = engine.two_prompts(model.config.vocab_size, 9)
    expected = engine.greedy(model, prompts, penalty=1.1)
    assert expected != engine.greedy(model, prompts)
    lm = engine.load(tmp_path, expert_fraction=0.5, batch=2)
    outputs = lm.generate(prompts, max_new_tokens=engine.NEW_TOKENS, repetition_penalty=1.1, ignore_eos=True)
    assert [output.tokens for output in outputs] == expected


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
