"""When blocks move: demand copies, prefetches, waves of prompts. One object for the engine and for replays."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal

import numpy as np
from jaxtyping import Int, UInt8

from ef_jax.errors import InputError
from ef_jax.memory.residency import Admission, Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.link import Blocks, Link, PrefetchLink
from ef_jax.schedule.prefetch import Prefetcher
from ef_jax.schedule.prompt_waves import Wave, prompt_waves
from ef_jax.stats import Stats
from ef_jax.timeline import STALLS, Timeline

Prefetch = int | Literal["auto", "off"]


class Scheduler(Generic[Blocks]):
    """Has the experts that a layer needs in slots, and counts what that took.

    A step is `begin_step`, then for each layer `ask` and `complete`, or `serve`, which is both. A layer that
    `cannot_miss` needs neither: its routing can be told later, by `note`.

    Nothing that a predictor does can change a token. One that raises or that gives scores which are no numbers is not
    asked again: prefetching is off from there on, and `stats.horizon` says why.

    Args:
      residency: which block is where.
      link: copies blocks.
      stats: counters to add to.
      block_bytes: bytes of one expert block.
      wave_size: blocks of a prompt that enter cache slots together, where there is no staging ring.
      predictor: says which experts come next, to the policy and for prefetches; None: neither.
      prefetch: layers ahead that are prefetched for. "auto": as measurements say. "off" or 0: only what is needed is
        copied.
      candidates: the rule by which blocks are chosen, see `Prefetcher`.
      now: the clock of timelines, in seconds.

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
        prefetch: Prefetch = "off",
        candidates: str = "value",
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.residency, self.link, self.stats = residency, link, stats
        self._timeline: Timeline | None = None
        self._now = now
        self._block_bytes, self._wave_size = block_bytes, wave_size
        self._predictor = predictor
        self._prefetcher: Prefetcher[Blocks] | None = None
        self._prefetches = self._wasted = 0
        self._pending: Blocks | None = None
        self._layer = -1
        if prefetch in ("off", 0):
            return
        if prefetch != "auto" and not (isinstance(prefetch, int) and 0 <= prefetch <= residency.layers):
            raise InputError(
                f'prefetch {prefetch!r:.60}: give "auto", "off" or a horizon of 0 to {residency.layers}, the number of '
                "MoE layers"
            )
        if predictor is None:
            raise InputError(f"prefetch {prefetch!r} needs a predictor: name one, or give prefetch off")
        if not isinstance(link, PrefetchLink):
            raise InputError(
                f"prefetch {prefetch!r} needs a link that can prefetch, which {type(link).__name__} cannot"
            )
        horizon = 4 if prefetch == "auto" else prefetch
        self._prefetcher = Prefetcher(residency, link, predictor, horizon=min(horizon, residency.layers))

    def show(self, timeline: Timeline | None) -> None:
        """Note stalls, copies and the horizon in `timeline` from now on; None: nowhere."""
        self._timeline = self.link.timeline = timeline
        self.residency.on_wasted = None if timeline is None else timeline.wasted

    def begin_step(
        self,
        tokens: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None = None,
        *,
        diversity: float | None = None,
    ) -> None:
        """A decode step begins.

        Args:
          tokens: the ids that the active sequences take in, in batch order.
          ahead: what the pre-gate sees from the embeddings of these tokens, see `Predictor.on_ahead`.
          diversity: k sum|v|^2 - |sum v|^2 over the embeddings v of the k tokens, see `need`.
        """
        policy, predictor = self.residency.policy, self._predictor
        policy.on_step(tokens)
        if predictor is not None:
            predictor.on_step(tokens)
            if ahead is not None:
                predictor.on_ahead(-1, ahead)
            if policy.wants_predictions:
                policy.on_predict(predictor.step_scores())

    def cannot_miss(self, layer: int) -> bool:
        """Every expert of `layer` is in a slot, so a step need not wait to hear which it uses."""
        return self.residency.has_all(layer)

    def note(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """A layer that could not miss chose the experts `rows`; told any time before the next step begins."""
        self.stats.decode.hits[layer] += self.residency.note(layer, rows)
        if self._predictor is not None:
            self._predictor.on_route(layer, rows)

    def serve(
        self, layer: int, rows: Sequence[Sequence[int]], ahead: UInt8[np.ndarray, "distances E"] | None = None
    ) -> Admission:
        """Have the experts of one layer of a decode step in slots: `ask`, then `complete`."""
        admission = self.ask(layer, rows, ahead)
        self.complete(admission)
        return admission

    def ask(
        self, layer: int, rows: Sequence[Sequence[int]], ahead: UInt8[np.ndarray, "distances E"] | None = None
    ) -> Admission:
        """Start what one layer of a decode step needs, and after it the prefetches for coming layers; never waits.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, in batch order and in the router's order.
          ahead: what the pre-gate sees from this layer, see `Predictor.on_ahead`.

        Returns:
          Where the experts are, or will be after `complete`, which has to follow before the next `ask`.
        """
        link, prefetcher, predictor = self.link, self._prefetcher, self._predictor
        self._layer = layer
        if prefetcher is not None:
            prefetcher.gate()
            self._count_prefetches(prefetcher.begun)
        admission = self.residency.admit(layer, rows)
        if predictor is not None:
            if ahead is not None:
                predictor.on_ahead(layer, ahead)
            predictor.on_route(layer, rows)
        phase = self.stats.decode
        phase.hits[layer] += admission.hits
        if missing := admission.missing:
            spent = link.seconds
            self._pending = link.start(layer, missing)
            phase.stall_seconds += link.seconds - spent
            phase.misses[layer] += len(missing)
            phase.bytes_demand += len(missing) * self._block_bytes
        if prefetcher is not None:
            prefetcher.plan(layer, rows)
            phase.late_hits[layer] += len(admission.late)
        return admission

    def complete(self, admission: Admission) -> None:
        """Wait until all that the last `ask` answered is in its slots."""
        link, began = self.link, self._now()
        spent = link.seconds
        if admission.late and self._prefetcher is not None:
            self._prefetcher.wait(self._layer, admission.late)
        if self._pending is not None:
            link.finish(self._pending, admission.missing_slots)
            self._pending = None
        self.stats.decode.stall_seconds += link.seconds - spent
        if self._timeline is not None and link.seconds > spent:
            late, missing = admission.late, admission.missing
            self._timeline.span(STALLS, f"layer {self._layer}", began, self._now(), late=late, missing=missing)

    def serve_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> Iterator[Wave]:
        """Waves of one layer of a prompt's chunk, each given out once its blocks are in their slots.

        The copies of a wave start before the wave before it is given out, so that its compute hides them.

        Args:
          layer: MoE layer.
          counts: rows of each expert.
        """
        residency, link, phase = self.residency, self.link, self.stats.prefill
        spent = link.seconds
        if self._prefetcher is not None:
            self._prefetcher.drain()
            self._count_prefetches(self._prefetcher.begun)
        waves, hits, misses = prompt_waves(residency, layer, counts, wave_size=self._wave_size)
        phase.hits[layer] += hits
        phase.misses[layer] += misses
        phase.bytes_demand += misses * self._block_bytes
        blocks = link.start(layer, waves[0].experts)
        for wave, following in zip(waves, [*waves[1:], None], strict=True):
            began, waited = self._now(), link.seconds
            link.finish(blocks, wave.slots)
            if self._timeline is not None and link.seconds > waited:
                self._timeline.span(STALLS, f"prompt, layer {layer}", began, self._now(), missing=wave.experts)
            if following is not None:
                link.settle()  # at most two waves of blocks are in flight
                blocks = link.start(layer, following.experts)
            yield wave
        residency.policy.on_prompt(layer, counts)
        phase.stall_seconds += link.seconds - spent

    def end_run(self) -> None:
        """No step follows for now: what is queued will not be fetched."""
        if self._prefetcher is not None:
            self._prefetcher.gate()
            self._count_prefetches(self._prefetcher.begun)

    def _count_prefetches(self, begun: int) -> None:
        """`begun` prefetches have begun in all. Those, and those that left their slots unused, since last asked."""
        phase, wasted = self.stats.decode, self.residency.wasted
        phase.bytes_prefetch += (begun - self._prefetches) * self._block_bytes
        phase.bytes_wasted += (wasted - self._wasted) * self._block_bytes
        self._prefetches, self._wasted = begun, wasted
