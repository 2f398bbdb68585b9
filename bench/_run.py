"""Driving an engine by hand: prompts into its first rows, then steps of all of them."""

from collections.abc import Sequence

import numpy as np

from ef_jax.runtime.engine import Engine
from ef_jax.runtime.sampling import SamplingOptions


def start(
    engine: Engine, prompts: Sequence[np.ndarray | Sequence[int]], options: SamplingOptions, until: int
) -> list[tuple[int, float]]:
    """Give each prompt a row, compile what it needs up to `until` positions, and run it.

    Returns:
      Each one's first token and its log-probability.
    """
    firsts: dict[int, tuple[int, float]] = {}
    for prompt in prompts:
        engine.prepare(len(prompt), until)
    for row, prompt in enumerate(prompts):
        engine.join(row, np.asarray(prompt, np.int32), options, row)
        for begin, width in engine.cuts(len(prompt)):
            firsts |= engine.prompt_pass(width, [(row, begin)])
    return [firsts[row] for row in range(len(prompts))]


def stop(engine: Engine, count: int) -> None:
    """The sequences of the first rows are done."""
    for row in range(count):
        engine.leave(row)
    engine.rest()
