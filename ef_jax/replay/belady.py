"""Belady's bound: the hits of a cache that knows the future and fetches on demand only.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966: who
leaves is the block whose next use is furthest. Time is counted in layer-steps: the keys that a running layer-step
needs are never victims. One list serves all layers; there are no floors. With bypass, or where a layer-step needs more
keys than there are slots, it matters who stays of two keys that are needed again together: the one that is needed again
sooner after that. Small cases, in which every schedule was tried, show no better rule.

Prompt passes are neither hits nor misses. An engine's prompt seeds free slots; here its keys may take any slot, with
the whole future in view, which no engine can better.
"""

import dataclasses

import numpy as np

from ef_jax.errors import InputError
from ef_jax.replay.clairvoyant_slots import ClairvoyantSlots
from ef_jax.replay.layer_steps import PROMPT, LayerSteps

_BLOCK_STEPS = 1 << 14  # layer-steps that are turned into Python lists at a time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheCount:
    """Distinct experts by layer and step that were resident when needed, and that were not; lists of L."""

    hits: list[int]
    misses: list[int]


def belady(steps: LayerSteps, slots: int, *, bypass: bool = False, count_from: int = 0) -> CacheCount:
    """Most hits that demand fetching can reach, by layer.

    Args:
      steps: what is needed, in order.
      slots: cache slots C, shared by all layers; 0 caches nothing.
      bypass: a miss may pass through without a slot, and does unless some resident key's next use is further away
        than its own. Without bypass every miss takes a slot, except where a layer-step needs more keys than C.
      count_from: layer-steps before this one run but are not counted.

    Raises:
      InputError: negative slots, or `count_from` outside the steps.
    """
    if not 0 <= count_from <= len(steps):
        raise InputError(f"count_from {count_from}: choose 0 to {len(steps)}, the number of layer-steps")
    misses_by_step = np.array(DemandRun(steps, slots, bypass=bypass).run(0, len(steps)), np.int64)[count_from:]
    layers, sizes = steps.layers[count_from:], np.diff(steps.starts)[count_from:]
    decode = layers != PROMPT
    needed, misses = (
        np.bincount(layers[decode], weights=count[decode], minlength=steps.num_layers).astype(np.int64)
        for count in (sizes, misses_by_step)
    )
    return CacheCount(hits=(needed - misses).tolist(), misses=misses.tolist())


class DemandRun:
    """A cache under Belady's rule, run over one stretch of layer-steps after another.

    Args:
      steps: what is needed, in order.
      slots: cache slots C.
      bypass: see `belady`.
      free_start: see `ClairvoyantSlots`.

    Raises:
      InputError: negative slots.
    """

    def __init__(self, steps: LayerSteps, slots: int, *, bypass: bool = False, free_start: int | None = None) -> None:
        self._steps, self._count, self._bypass = steps, slots, bypass
        self._slots = ClairvoyantSlots(steps, slots, free_start=free_start)

    @property
    def contents(self) -> bytes:
        """One byte a key, 1 where it has a slot."""
        return bytes(self._slots.resident)

    def run(self, first: int, last: int) -> list[int]:
        """Misses of each of the layer-steps `first` to `last`, 0 for prompts."""
        misses: list[int] = []
        for begin in range(first, last, _BLOCK_STEPS):
            misses += self._run_block(begin, min(begin + _BLOCK_STEPS, last))
        return misses

    def _run_block(self, first: int, last: int) -> list[int]:
        steps, slots, count, bypass = self._steps, self._slots, self._count, self._bypass
        resident, take = slots.resident, slots.take
        part = slice(int(steps.starts[first]), int(steps.starts[last]))
        keys, entries = steps.keys[part].tolist(), steps.entries(steps.next_use[part], steps.keys[part]).tolist()
        ends = (steps.starts[first + 1 : last + 1] - part.start).tolist()
        limits = steps.limits(first, last).tolist()
        prompts = (steps.layers[first:last] == PROMPT).tolist()
        misses, begin = [], 0
        for end, limit, prompt in zip(ends, limits, prompts, strict=True):
            missing: list[int] = []
            if prompt:
                slots.prompt(keys[begin:end], entries[begin:end], limit)
            else:
                missing = [at for at in range(begin, end) if not resident[keys[at]]]
                crowded = bypass or end - begin > count
                if missing and crowded:
                    missing.sort(key=entries.__getitem__, reverse=True)  # needed first, served first
                for at in missing:
                    take(keys[at], entries[at] if bypass else limit)
                held = entries[begin:end]
                if crowded:
                    held = [entries[at] for at in range(begin, end) if resident[keys[at]]]
                slots.used(held, limit)
            misses.append(len(missing))
            begin = end
        return misses
