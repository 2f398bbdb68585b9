"""Lengths of the parity tests' prompts, and prompts for the bundled model; families are in `tests.parity.families`."""

from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "fixtures" / "parity"

TOKENS = 40
"""Tokens of a prompt: several chunks of `CHUNK`, and longer than every sliding window of the families."""

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
