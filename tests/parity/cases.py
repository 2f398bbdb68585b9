"""What the parity tests compare: small configurations of every family, and prompts for the bundled model."""

from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures" / "parity"

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# (family, seed, what differs from the sizes of tests.nn.reference). Together they switch every optional feature of
# each family on and off.
LIVE: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("qwen3_moe", 0, {}),
    ("qwen3_moe", 1, {}),
    ("qwen3_moe", 2, {"norm_topk_prob": False, "tie_word_embeddings": True}),
    ("qwen3_moe", 3, {"mlp_only_layers": [1], "attention_bias": True}),
    ("qwen3_moe", 4, {"num_hidden_layers": 4, "decoder_sparse_step": 2, "rope_parameters": LINEAR}),
    ("qwen3_moe", 5, {"use_sliding_window": True, "sliding_window": 5, "rope_parameters": LLAMA3}),
    ("qwen3_moe", 6, {"rope_parameters": YARN, "hidden_act": "gelu_pytorch_tanh"}),
    ("qwen2_moe", 0, {}),
    ("qwen2_moe", 1, {}),
    ("qwen2_moe", 2, {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True}),
    ("qwen2_moe", 3, {"mlp_only_layers": [0], "rope_parameters": LLAMA3}),
    ("qwen2_moe", 4, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("mixtral", 0, {}),
    ("mixtral", 1, {}),
    ("mixtral", 2, {"sliding_window": 6, "tie_word_embeddings": True}),
    ("mixtral", 3, {"head_dim": 12, "num_key_value_heads": 4, "rope_parameters": YARN}),
    ("olmoe", 0, {}),
    ("olmoe", 1, {}),
    ("olmoe", 2, {"clip_qkv": 0.7, "norm_topk_prob": True, "rope_parameters": LINEAR}),
    ("olmoe", 3, {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
)

# Folder of the fixture -> the same three.
RECORDED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", 10, {}),
    "qwen3_moe_features": (
        "qwen3_moe",
        11,
        {
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "rope_parameters": YARN,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        12,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "rope_parameters": LLAMA3},
    ),
    "mixtral": ("mixtral", 13, {"sliding_window": 6}),
    "olmoe": ("olmoe", 14, {"clip_qkv": 0.7, "norm_topk_prob": True, "tie_word_embeddings": True}),
}

TOKENS = 40
"""Tokens of a prompt: several chunks of `CHUNK`, and longer than every sliding window above."""

CHUNK = 16

NEW_TOKENS_BUNDLED = 32
"""Tokens that the bundled model adds to each of its prompts."""

_README_PROMPTS = (
    "Psalms 23\n1 The LORD is my shepherd;",
    "1 Samuel 4\n1 And the word of",
    "ROMEO:\nO, she doth teach the torches to burn bright!",
    "import os\nimport sys\n\ndef main():\n    parser =",
    "oak, oak tree (noun):",
)
_PROMPTS = 20
_LINE_LENGTH = range(24, 160)


def bundled_prompts(small_moe: Path) -> list[str]:
    """20 prompts: those of the model card, then lines of the held-out texts.

    Of every text in turn, the line one, two and three fourths down its lines of ordinary length.
    """
    texts = []
    for path in sorted((small_moe / "valid").glob("*.txt")):
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
        texts.append([line for line in lines if len(line) in _LINE_LENGTH])
    lines = [text[len(text) * quarter // 4] for quarter in (1, 2, 3) for text in texts]
    return [*_README_PROMPTS, *lines][:_PROMPTS]
