"""When blocks move: demand copies of decode steps, waves of prompts. One object for the engine and for replays."""

from collections.abc import Iterator, Sequence
from typing import Generic

import numpy as np
from jaxtyping import Int

from ef_jax.memory.residency import Admission, Residency
from ef_jax.schedule.link import Blocks, Link
from ef_jax.schedule.prompt_waves import Wave, prompt_waves
from ef_jax.stats import Stats


class Scheduler(Generic[Blocks]):
    """Has the experts that a layer needs in slots, and counts what that took.

    Args:
      residency: which block is where.
      link: copies blocks.
      stats: counters to add to.
      block_bytes: bytes of one expert block.
      wave_size: blocks of a prompt that enter cache slots together, where there is no staging ring.
    """

    def __init__(
        self, residency: Residency, link: Link[Blocks], stats: Stats, *, block_bytes: int, wave_size: int
    ) -> None:
        self.residency, self.link, self.stats = residency, link, stats
        self._block_bytes, self._wave_size = block_bytes, wave_size

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A decode step begins; `tokens` are the ids that the active sequences take in, in batch order."""
        self.residency.policy.on_step(tokens)

    def serve(self, layer: int, rows: Sequence[Sequence[int]]) -> Admission:
        """Have the experts of one layer of a decode step in slots.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, in batch order and in the router's order.
        """
        admission = self.residency.admit(layer, rows)
        phase = self.stats.decode
        phase.hits[layer] += admission.hits
        if missing := admission.missing:
            link = self.link
            spent = link.seconds
            link.finish(link.start(layer, missing), admission.missing_slots)
            phase.misses[layer] += len(missing)
            phase.bytes_demand += len(missing) * self._block_bytes
            phase.stall_seconds += link.seconds - spent
        return admission

    def serve_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> Iterator[Wave]:
        """Waves of one layer of a prompt's chunk, each given out once its blocks are in their slots.

        The copies of a wave start before the wave before it is given out, so that its compute hides them.

        Args:
          layer: MoE layer.
          counts: rows of each expert.
        """
        residency, link, phase = self.residency, self.link, self.stats.prefill
        waves, hits, misses = prompt_waves(residency, layer, counts, wave_size=self._wave_size)
        phase.hits[layer] += hits
        phase.misses[layer] += misses
        phase.bytes_demand += misses * self._block_bytes
        spent = link.seconds
        blocks = link.start(layer, waves[0].experts)
        for wave, following in zip(waves, [*waves[1:], None], strict=True):
            link.finish(blocks, wave.slots)
            if following is not None:
                link.settle()  # at most two waves of blocks are in flight
                blocks = link.start(layer, following.experts)
            yield wave
        residency.policy.on_prompt(layer, counts)
        phase.stall_seconds += link.seconds - spent
