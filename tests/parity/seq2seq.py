"""Random Switch Transformers in torch, and what transformers makes of a prompt, beside our engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.cases import FIXTURES

FIXTURE = FIXTURES / "switch_transformers"

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 6,
    "expert_capacity": 40,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
"""Half of the decoder's layers are dense; no expert is ever full."""

TOKENS, NEW_TOKENS = 40, 16
CONTEXT = TOKENS + NEW_TOKENS


def torch_model(seed: int, **changes: Any) -> Any:
    """A small random float32 model whose logits are of order 1."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model("switch_transformers", **{**SIZES, **changes})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name in ("shared.weight", "lm_head.weight") or parameter.ndim == 1:
                parameter.normal_(0.0, 0.5)
            elif "relative" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 1.5 / np.sqrt(parameter.shape[-1]))
    return model


def save_model(path: Path, seed: int, **changes: Any) -> Any:
    model = torch_model(seed, **changes)
    model.save_pretrained(path)
    return model


def case_ids(cases: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """Names of cases for pytest: seed, changed fields."""
    return ["-".join([str(seed), *changes]) for seed, changes in cases]


def prompt_and_text(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids for the encoder and for the decoder."""
    random = np.random.default_rng(seed)
    return random.integers(1, SIZES["vocab_size"], TOKENS), random.integers(1, SIZES["vocab_size"], NEW_TOKENS - 1)


def torch_logits(model: Any, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """float32 `[1 + C, V]`: the decoder takes one token after the other, as when it generates.

    (In one pass over a text an expert of its decoder may be full; in passes over one token none ever is.)
    """
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache, found = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    with torch.no_grad():
        memory = model.encoder(input_ids=torch.tensor(prompt[None]))
        for token in [model.config.decoder_start_token_id, *text.tolist()]:
            given = torch.tensor([[token]])
            output = model(encoder_outputs=memory, decoder_input_ids=given, past_key_values=cache, use_cache=True)
            found.append(output.logits[0, 0].float().numpy())
    return np.stack(found)


def greedy(model: Any, prompts: Sequence[np.ndarray]) -> list[list[int]]:
    """Transformers' greedy continuations, one prompt at a time."""
    import torch

    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append(output[0, 1:].tolist())
    return found
