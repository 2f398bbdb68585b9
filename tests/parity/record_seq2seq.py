"""Record what transformers computes of Switch Transformers: `python -m tests.parity.record_seq2seq`.

As `tests.parity.record`, of a model that has an encoder: expected.npz holds the prompt, the text that the decoder is
given, and the logits f32 [1 + C, V] of each of its steps.
"""

import shutil

import numpy as np
import torch

from tests.parity import seq2seq

CASE = (11, {"expert_capacity": 4})


def main() -> None:
    seed, changes = CASE
    model = seq2seq.torch_model(seed, **changes)
    with torch.no_grad():
        for weights in model.state_dict().values():
            weights.copy_(weights.bfloat16())
    prompt, text = seq2seq.prompt_and_text(seed)
    logits = seq2seq.torch_logits(model, prompt, text)
    shutil.rmtree(seq2seq.FIXTURE, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(seq2seq.FIXTURE)
    (seq2seq.FIXTURE / "generation_config.json").unlink()
    np.savez(
        seq2seq.FIXTURE / "expected.npz", prompt=prompt.astype(np.int32), text=text.astype(np.int32), logits=logits
    )


if __name__ == "__main__":
    main()
