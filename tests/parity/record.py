"""Record what transformers computes, for tests that run without torch: `python -m tests.parity.record [FOLDER ...]`.

Needs torch and transformers; overwrites folders of `tests/fixtures/parity`, all if none is named. The weights of a case
are rounded to bfloat16, which halves the file; its logits are computed from the rounded weights in float32.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.nn import reference
from tests.parity.cases import FIXTURES, NEW_TOKENS_BUNDLED, TOKENS, bundled_prompts
from tests.parity.families import RECORDED, Changes

SMALL_MOE = Path(__file__).parent.parent.parent / "ef_jax" / "models" / "small_moe"


def record_case(directory: Path, model_type: str, seed: int, changes: Changes) -> None:
    """Write a checkpoint (config.json, model.safetensors) and expected.npz: ids [T], logits f32 [T, V]."""
    model = reference.torch_model(model_type, seed, **changes)
    with torch.no_grad():
        for weights in model.state_dict().values():
            weights.copy_(weights.bfloat16())
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, TOKENS)
    logits = reference.torch_logits(model, ids[None])[0]
    shutil.rmtree(directory, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    np.savez(directory / "expected.npz", ids=ids.astype(np.int32), logits=logits)


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation, and by how much each of its tokens' logits leads the next best."""
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            do_sample=False,  # the checkpoint's own generation config samples, and fills in what is not given
            max_new_tokens=NEW_TOKENS_BUNDLED,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    best = torch.cat(output.logits).float().topk(2).values
    return output.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def record_bundled(path: Path) -> None:
    """Write the bundled model's continuations, computed in its own bfloat16 and in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL_MOE)
    prompts: list[dict[str, Any]] = [
        {"text": text, "ids": tokenizer(text)["input_ids"]} for text in bundled_prompts(SMALL_MOE)
    ]
    for dtype in ("bfloat16", "float32"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            SMALL_MOE, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        for prompt in prompts:
            tokens, margins = greedy(model, prompt["ids"])
            prompt[dtype] = {"tokens": tokens, "margins": [round(margin, 5) for margin in margins]}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n  ".join(json.dumps(prompt) for prompt in prompts)
    path.write_text(f'{{"versions": {json.dumps(versions)},\n "prompts": [\n  {lines}\n ]}}\n', encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or RECORDED:
        record_case(FIXTURES / name, *RECORDED[name])
    if not sys.argv[1:]:
        record_bundled(FIXTURES / "small_moe_greedy.json")


if __name__ == "__main__":
    main()
