"""The engine beside transformers: what the parity tests compare, and the table of grades reports."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ef_jax
from ef_jax.runtime.language_model import LanguageModel
from tests.nn import reference
from tests.parity.cases import CHUNK, TOKENS

NEW_TOKENS = 24


def save_model(path: Path, model_type: str, seed: int, changes: Mapping[str, Any], **options: Any) -> Any:
    """A random model of a family, in torch, saved as transformers saves it; its logits are of order 1.

    The configuration names the family, also where transformers knows it under another name.
    """
    model = reference.torch_model(model_type, seed, **changes)
    model.save_pretrained(path, **options)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"model_type": model_type}), encoding="utf-8")
    return model


def load(path: Path, **options: Any) -> LanguageModel:
    return ef_jax.load(path, context=TOKENS + NEW_TOKENS, chunk=CHUNK, progress=False, **options)


def load_offloaded(path: Path, seed: int) -> LanguageModel:
    """With slots for half or a quarter of the experts."""
    return load(path, expert_fraction=0.25 if seed % 2 else 0.5)


def logits_error(model: Any, lm: LanguageModel, seed: int) -> float:
    """The largest difference of a prompt's logits from transformers'; the experts were really fetched.

    Near-ties in router scores are not looked for: in float32 a seed with one is rare, and another seed is taken.
    """
    ids = np.random.default_rng(seed).integers(0, lm.spec.vocab, TOKENS)
    expected = reference.torch_logits(model, ids[None])[0]
    assert 0.3 < expected.std() < 3
    error = np.abs(lm.logits(ids) - expected).max()
    assert lm.stats.slots < lm.stats.experts
    assert sum(lm.stats.prefill.misses) > lm.stats.slots
    assert lm.stats.prefill.bytes_demand == sum(lm.stats.prefill.misses) * lm.spec.block_bytes
    return float(error)


def two_prompts(vocab: int, seed: int) -> list[np.ndarray]:
    """Prompts of different lengths, one longer than the windows and chunks of every family."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, length) for length in (TOKENS, 7)]


def greedy(model: Any, prompts: Sequence[np.ndarray], penalty: float = 1.0) -> list[list[int]]:
    """Transformers' greedy continuations, one prompt at a time."""
    import torch

    model.generation_config.eos_token_id = None
    continuations = []
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
        continuations.append(output[0, len(prompt) :].tolist())
    return continuations
