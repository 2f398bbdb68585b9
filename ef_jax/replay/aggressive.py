"""A prefetch schedule that sees the future: what a link can reach, block by block.

P. Cao, E. W. Felten, A. R. Karlin and K. Li, "A study of integrated prefetching and caching strategies", SIGMETRICS
1995, call it aggressive: whenever the link is idle, fetch the missing block that is needed first into the slot of the
block that is needed last, unless that one is needed before it (do no harm). Its elapsed time is close to the least
one, but not always the least.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from ef_jax.replay.clairvoyant_slots import ClairvoyantSlots
from ef_jax.replay.layer_steps import PROMPT, LayerSteps

_BLOCK_STEPS = 1 << 14  # layer-steps that are turned into Python lists at a time


def aggressive_schedule(
    steps: LayerSteps, slots: int, *, block_seconds: float, compute_seconds: Float64[np.ndarray, "n"]
) -> tuple[Float64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """When each layer-step ends, in seconds from the start with an empty cache, and the blocks fetched by then.

    A block holds its slot from the start of its copy; its fetch counts from there on. A prompt takes no time, and
    nothing is fetched across one.

    Args:
      steps: what is needed, in order.
      slots: slots C, at least `steps.widest`.
      block_seconds: time of one block on the link.
      compute_seconds: of each layer-step.
    """
    cache = ClairvoyantSlots(steps, slots)
    missing = _missing(steps, cache.resident)
    wanted = next(missing)
    arrival: dict[int, float] = {}  # of the last block fetched for a layer-step
    link_free = done = 0.0
    fetched = 0
    ends, fetches = [], []
    for step, need in enumerate(_needs(steps)):
        if need.prompt:
            cache.prompt(need.keys, need.entries, need.limit)
            wanted = next(missing)
        while wanted.step == step:
            cache.take(wanted.key, wanted.limit)
            arrival[step] = link_free = max(link_free, done) + block_seconds
            fetched += 1
            wanted = next(missing)
        start = max(done, arrival.pop(step, 0.0))
        done = start + float(compute_seconds[step])
        while wanted.key >= 0 and max(link_free, start) < done and cache.take(wanted.key, wanted.limit):
            arrival[wanted.step] = link_free = max(link_free, start) + block_seconds
            fetched += 1
            wanted = next(missing)
        if not need.prompt:
            cache.used(need.entries, need.limit)
        ends.append(done)
        fetches.append(fetched)
    return np.array(ends, np.float64), np.array(fetches, np.int64)


class _Need(NamedTuple):
    """A layer-step's keys, when they are needed next (`LayerSteps.entries`), and its `LayerSteps.limits`."""

    keys: list[int]
    entries: list[int]
    limit: int
    prompt: bool


class _Wanted(NamedTuple):
    """An absent key that `step` needs; key -1: nothing can be said before `step`, a prompt or the end."""

    step: int
    key: int
    limit: int


def _needs(steps: LayerSteps) -> Iterator[_Need]:
    for first in range(0, len(steps), _BLOCK_STEPS):
        last = min(first + _BLOCK_STEPS, len(steps))
        part = slice(int(steps.starts[first]), int(steps.starts[last]))
        keys, entries = steps.keys[part].tolist(), steps.entries(steps.next_use[part], steps.keys[part]).tolist()
        ends = (steps.starts[first + 1 : last + 1] - part.start).tolist()
        prompts = (steps.layers[first:last] == PROMPT).tolist()
        begin = 0
        for end, limit, prompt in zip(ends, steps.limits(first, last).tolist(), prompts, strict=True):
            yield _Need(keys[begin:end], entries[begin:end], limit, prompt)
            begin = end


def _missing(steps: LayerSteps, resident: bytearray) -> Iterator[_Wanted]:
    """The absent keys in order of need; what is `resident` is looked up as late as possible."""
    for step, need in enumerate(_needs(steps)):
        if need.prompt:
            yield _Wanted(step, -1, 0)
            continue
        for key in need.keys:
            if not resident[key]:
                yield _Wanted(step, key, need.limit)
    yield _Wanted(len(steps), -1, 0)
