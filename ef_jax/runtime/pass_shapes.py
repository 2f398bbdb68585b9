"""The few shapes that passes come in, so that few programs serve sequences of every length."""

from collections.abc import Iterator, Sequence

from ef_jax.nn import KEY_BLOCK

PASS_TOKENS = 1024
"""Tokens that a pass of prompts takes, or one chunk if that is more: decode steps wait for no longer a pass."""


def chunk_widths(chunk: int) -> tuple[int, ...]:
    """Widths that a prompt is cut into: `chunk`, and a fourth and a sixteenth of it for what is left over."""
    return tuple(sorted({max(2, width) for width in (chunk // 16, chunk // 4, chunk)}))


_NARROWEST = 16


def prompt_widths(context: int) -> tuple[int, ...]:
    """Widths of the passes that take prompts whole: powers of two from 16, and whole key blocks that hold the context.

    A prompt's results depend on its length alone, since that decides on the width.
    """
    longest = max(2, context if context <= KEY_BLOCK else context + -context % KEY_BLOCK)
    powers = (_NARROWEST << place for place in range(longest.bit_length()))
    return (*(width for width in powers if width < longest), longest)


def chunks(length: int, widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`(start, width)` of the chunks that a prompt of `length` tokens is cut into; `widths` are rising."""
    start = 0
    while start < length:
        left = length - start
        width = next((width for width in widths if width >= left), widths[-1])
        yield start, width
        start += width


def lanes(width: int, batch: int) -> int:
    """Sequences of a pass of that width, of at most `batch`; it depends on nothing else, see `Programs`."""
    return batch if width == 1 else min(batch, max(1, PASS_TOKENS // width))


def spans(context: int) -> tuple[int, ...]:
    """Lengths of the caches that programs read: a key block times powers of four, and all that holds the context."""
    if context <= KEY_BLOCK:
        return (context,)
    shorter = []
    span = KEY_BLOCK
    while span < context:
        shorter.append(span)
        span *= 4
    return (*shorter, context + -context % KEY_BLOCK)
