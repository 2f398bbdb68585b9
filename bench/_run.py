"""Driving an engine by hand: prompts into its first rows, then steps of all of them."""

from collections.abc import Sequence

import numpy as np

from ef_jax.runtime.engine import Engine
from ef_jax.sampling_options import SamplingOptions


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
    cuts = {row: engine.cuts(len(prompt)) for row, prompt in enumerate(prompts)}
    while cuts:
        width = next(iter(cuts.values()))[0][1]
        rows = [row for row, left in cuts.items() if left[0][1] == width][: engine.lanes(width)]
        firsts |= engine.prompt_pass(width, [(row, cuts[row].pop(0)[0]) for row in rows])
        cuts = {row: left for row, left in cuts.items() if left}
    return [firsts[row] for row in range(len(prompts))]


def stop(engine: Engine, count: int) -> None:
    """The sequences of the first rows are done."""
    for row in range(count):
        engine.leave(row)
    engine.rest()
