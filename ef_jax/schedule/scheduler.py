"""When blocks move: demand copies, prefetches, waves of prompts. One object for the engine and for replays."""

from collections.abc import Iterator, Sequence
from typing import Generic

import numpy as np
from jaxtyping import Int

from ef_jax.errors import InputError
from ef_jax.memory.residency import Admission, Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.link import Blocks, Link, PrefetchLink
from ef_jax.schedule.prefetch import Prefetcher
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
      predictor: says which experts come next, to the policy and for prefetches; None: neither.
      horizon: layers ahead that are prefetched for; 0: only what is needed is copied.
      threshold: the least probability of use that is worth a prefetch. Above one half, a copy is used more often
        than not.

    Raises:
      InputError: a horizon without a predictor, beyond the number of layers, or over a link that cannot prefetch.
    """

    def __init__(
        self,
        residency: Residency,
        link: Link[Blocks],
        stats: Stats,
        *,
        block_bytes: int,
        wave_size: int,
        predictor: Predictor | None = None,
        horizon: int = 0,
        threshold: float = 0.5,
    ) -> None:
        self.residency, self.link, self.stats = residency, link, stats
        self._block_bytes, self._wave_size = block_bytes, wave_size
        self._predictor = predictor
        self._ahead: Prefetcher[Blocks] | None = None
        self._prefetches = self._wasted = 0
        if not 0 <= horizon <= residency.layers:
            raise InputError(f"horizon {horizon}: give 0 to {residency.layers}, the number of MoE layers")
        if horizon:
            if predictor is None:
                raise InputError(f"horizon {horizon} needs a predictor: name one, or give horizon 0")
            if not isinstance(link, PrefetchLink):
                raise InputError(
                    f"horizon {horizon} needs a link that can prefetch, which {type(link).__name__} cannot"
                )
            self._ahead = Prefetcher(residency, link, predictor, horizon=horizon, threshold=threshold)

    def begin_step(self, tokens: Sequence[int]) -> None:
        """A decode step begins; `tokens` are the ids that the active sequences take in, in batch order."""
        policy, predictor = self.residency.policy, self._predictor
        policy.on_step(tokens)
        if predictor is not None:
            predictor.on_step(tokens)
            if policy.wants_predictions:
                policy.on_predict(predictor.step_scores())

    def serve(self, layer: int, rows: Sequence[Sequence[int]]) -> Admission:
        """Have the experts of one layer of a decode step in slots.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, in batch order and in the router's order.
        """
        if self._predictor is not None:
            return self._serve_predicted(layer, rows, self._predictor)
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
        spent = link.seconds
        if self._ahead is not None:
            self._ahead.drain()
            self._count_prefetches(self._ahead.begun)
        waves, hits, misses = prompt_waves(residency, layer, counts, wave_size=self._wave_size)
        phase.hits[layer] += hits
        phase.misses[layer] += misses
        phase.bytes_demand += misses * self._block_bytes
        blocks = link.start(layer, waves[0].experts)
        for wave, following in zip(waves, [*waves[1:], None], strict=True):
            link.finish(blocks, wave.slots)
            if following is not None:
                link.settle()  # at most two waves of blocks are in flight
                blocks = link.start(layer, following.experts)
            yield wave
        residency.policy.on_prompt(layer, counts)
        phase.stall_seconds += link.seconds - spent

    def end_run(self) -> None:
        """No step follows for now: what is queued will not be fetched."""
        if self._ahead is not None:
            self._ahead.gate()
            self._count_prefetches(self._ahead.begun)

    def _serve_predicted(self, layer: int, rows: Sequence[Sequence[int]], predictor: Predictor) -> Admission:
        """`serve`, with prefetches started between the start of the demand copies and the wait for them."""
        link, ahead, phase = self.link, self._ahead, self.stats.decode
        spent = link.seconds
        if ahead is not None:
            ahead.gate()
            self._count_prefetches(ahead.begun)
        admission = self.residency.admit(layer, rows)
        missing, late = admission.missing, admission.late
        predictor.on_route(layer, rows)
        blocks = link.start(layer, missing)
        if ahead is not None:
            ahead.plan(layer, rows)
            if late:
                ahead.wait(layer, late)
        if missing:
            link.finish(blocks, admission.missing_slots)
        phase.hits[layer] += admission.hits
        phase.late_hits[layer] += len(late)
        phase.misses[layer] += len(missing)
        phase.bytes_demand += len(missing) * self._block_bytes
        phase.stall_seconds += link.seconds - spent
        return admission

    def _count_prefetches(self, begun: int) -> None:
        """`begun` prefetches have begun in all. Those, and those that left their slots unused, since last asked."""
        phase, wasted = self.stats.decode, self.residency.wasted
        phase.bytes_prefetch += (begun - self._prefetches) * self._block_bytes
        phase.bytes_wasted += (wasted - self._wasted) * self._block_bytes
        self._prefetches, self._wasted = begun, wasted
