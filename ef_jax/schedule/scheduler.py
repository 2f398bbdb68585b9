"""When blocks move: demand copies, prefetches, waves of prompts. One object for the engine and for replays."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

import numpy as np
from jaxtyping import Int, UInt8

from ef_jax.errors import InputError
from ef_jax.memory.residency import Admission, Residency
from ef_jax.predict.accuracy import Accuracy
from ef_jax.predict.predictor import Predictor
from ef_jax.schedule.arrivals import Arrivals
from ef_jax.schedule.link import Blocks, Link, PrefetchLink
from ef_jax.schedule.prefetch import PredictorError, Prefetcher, distinct
from ef_jax.schedule.prompt_waves import Wave, prompt_waves
from ef_jax.schedule.tier import Tier
from ef_jax.schedule.trial import Trial
from ef_jax.stats import Stats
from ef_jax.timeline import STALLS, Timeline

Prefetch = int | str  # layers, "auto" or "off"


class Scheduler(Generic[Blocks]):
    """Has the experts that a layer needs in slots, and counts what that took.

    A step is `begin_step`, then for each layer `ask` and `complete`, or `serve`, which is both. A layer that
    `cannot_miss` needs neither: its routing can be told later, by `note`.

    Where the horizon is "auto", a `Trial` by the clock decides whether prefetching pays at all.

    Nothing that a predictor does can change a token. One that raises or that gives scores which are no numbers is not
    asked again: prefetching is off from there on, and `stats.horizon` says why.

    Args:
      residency: which block is where.
      link: copies blocks.
      stats: counters to add to.
      block_bytes: bytes of one expert block.
      wave_size: blocks of a prompt that enter cache slots together, where there is no staging ring.
      predictor: says which experts come next, to the policy and for prefetches; None: neither.
      prefetch: layers ahead that are prefetched for. "auto": as measurements say, and nothing where there is no
        predictor or the link cannot prefetch. "off" or 0: only what is needed is copied.
      candidates: how blocks are chosen, see `Prefetcher`.
      need: estimate of the blocks that are needed, see `Prefetcher`.
      most_wasted: share of the bytes moved that may be fetched for nothing, see `WasteBound`.
      lingers: `ask` may be told of blocks to copy later.
      trial: where prefetching is automatic, hold a `Trial` of it; False where nothing but copies takes the host time,
        as on a virtual clock.
      below: the host's blocks where part of them is on disk; None: all of them are in host memory.
      now: the clock of trials and timelines, in seconds.

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
        need: str = "batch",
        most_wasted: float = 1.0,
        lingers: bool = False,
        trial: bool = True,
        below: Tier | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.residency, self.link, self.stats = residency, link, stats
        self._timeline: Timeline | None = None
        self._now, self._below = now, below
        self._block_bytes, self._wave_size = block_bytes, wave_size
        self._predictor = predictor
        self._accuracy: Accuracy | None = None
        self._prefetcher: Prefetcher[Blocks] | None = None
        self._arrivals: Arrivals[Blocks] | None = None
        if lingers and isinstance(link, PrefetchLink):
            self._arrivals = Arrivals(residency, link)
        self._lingers = self._arrivals is not None
        self._prefetches = self._wasted = 0
        self._pending: Blocks | None = None
        self._layer = -1
        self._unsure = self._resting = self._gated = False
        self._off_because = self._reason_to_be_off(prefetch)
        if self._off_because is None and predictor is not None and isinstance(link, PrefetchLink):
            horizon = prefetch if isinstance(prefetch, int) else None
            self._arrivals = self._prefetcher = Prefetcher(
                residency,
                link,
                predictor,
                horizon=horizon,
                candidates=candidates,
                need=need,
                most_wasted=most_wasted,
                among=None if below is None else lambda: (residency.slot_of >= 0) | (below.residency.slot_of >= 0),
            )
        if below is not None:
            stats.disk, trial = below.stats, False  # by the clock, a step with a read in it says nothing about copies
            if predictor is not None:
                below.listen(predictor, residency, most_wasted=most_wasted)
        self._trial = Trial(now) if trial and self._prefetcher is not None and prefetch == "auto" else None
        self._report()

    def _reason_to_be_off(self, prefetch: Prefetch) -> str | None:
        """Why nothing will be prefetched; None: it will."""
        if prefetch in ("off", 0):
            return "it is off"
        layers = self.residency.layers
        if prefetch != "auto" and not (isinstance(prefetch, int) and 0 <= prefetch <= layers):
            raise InputError(
                f'prefetch {prefetch!r:.60}: give "auto", "off" or a horizon of 0 to {layers}, the number of MoE layers'
            )
        if self._predictor is None:
            missing, fix = "a predictor", "name one"
        elif not isinstance(self.link, PrefetchLink):
            missing, fix = f"a link that can prefetch, which {type(self.link).__name__} cannot", "choose another"
        elif prefetch == "auto" and not self.residency.policy.gives_way:
            return f"the cache policy {type(self.residency.policy).__name__} lets nothing leave for a prediction"
        else:
            return None
        if prefetch == "auto":
            return f"it needs {missing}"
        raise InputError(f"prefetch {prefetch} needs {missing}: {fix}, or give prefetch off")

    def show(self, timeline: Timeline | None) -> None:
        """Note stalls, copies and the horizon in `timeline` from now on; None: nowhere."""
        self._timeline = self.link.timeline = timeline
        if self._below is not None:
            self._below.show(timeline)
        self.residency.on_wasted = None if timeline is None else timeline.wasted

    @property
    def on_trial(self) -> bool:
        """Whether a run may find out that steps are faster without prefetching."""
        return self._trial is not None

    def listens(self) -> bool:
        """Whether the steps that follow listen to predictions. They do not where a trial has found that they are faster
        without, until it is time to try again; so programs need not look ahead either."""
        self._resting = self._predictor is None or (self._trial is not None and not self._trial.wanted)
        return not self._resting

    @property
    def hears(self) -> bool:
        """Whether a step that begins now would listen to predictions."""
        return self._predictor is not None and not self._resting

    def begin_step(
        self,
        tokens: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None = None,
        *,
        diversity: float | None = None,
        paths: UInt8[np.ndarray, "L E"] | None = None,
        following: UInt8[np.ndarray, "L E"] | None = None,
    ) -> None:
        """A decode step begins.

        Args:
          tokens: the ids that the active sequences take in, in batch order.
          ahead: what the pre-gate sees from the embeddings of these tokens, see `Predictor.on_ahead`.
          diversity: k sum|v|^2 - |sum v|^2 over the embeddings v of the k tokens, see `need`.
          paths: what the tokens are predicted to use in all layers, see `Predictor.on_paths`.
          following: the same of the tokens of the next step, where they are known already.
        """
        self._gated = False
        self._make_sure()
        self.residency.policy.on_step(tokens)
        if self._below is not None:
            self._below.begin_step(tokens, diversity, listens=self._predictor is not None)
        if self._trial is not None:
            if self._resting:
                self._trial.rest()
            else:
                self._trial.begin_step(len(tokens))
        if self._resting:
            return
        if self._accuracy is not None:
            self._accuracy.on_step()
        if (predictor := self._predictor) is not None:
            try:
                self._foresee(predictor, tokens, ahead, diversity, paths, following)
            except Exception as error:
                self._give_up(error)

    def cannot_miss(self, layer: int) -> bool:
        """Every expert of `layer` is in a slot, so a step need not wait to hear which it uses."""
        return self.residency.has_all(layer)

    def note(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """A layer that could not miss chose the experts `rows`; told any time before the next step begins."""
        self.stats.decode.hits[layer] += self.residency.note(layer, rows)
        self._hear(layer, rows, None)

    def serve(
        self, layer: int, rows: Sequence[Sequence[int]], ahead: UInt8[np.ndarray, "distances E"] | None = None
    ) -> Admission:
        """Have the experts of one layer of a decode step in slots: `ask`, then `complete`."""
        admission = self.ask(layer, rows, ahead)
        self.complete(admission)
        return admission

    def absent(self, layer: int, rows: Sequence[Sequence[int]]) -> list[int]:
        """Of the experts that a layer of a step needs, those that would have to be copied; `ask` is to follow."""
        self._gate()
        self._gated = True
        return self.residency.absent(layer, distinct(rows))

    def ask(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        ahead: UInt8[np.ndarray, "distances E"] | None = None,
        *,
        left: Sequence[int] = (),
        later: Sequence[int] = (),
    ) -> Admission:
        """Start what one layer of a decode step needs, and after it the prefetches for coming layers; never waits.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence, in batch order and in the router's order.
          ahead: what the pre-gate sees from this layer, see `Predictor.on_ahead`.
          left: of what `absent` has told, the experts that are not to be copied.
          later: of these, those to be copied when the link has nothing else to do, for their next use.

        Returns:
          Where the experts are, or will be after `complete`, which has to follow before the next `ask` unless nothing
          is missing or late.
        """
        link, prefetcher, phase = self.link, self._prefetcher, self.stats.decode
        self._layer = layer
        if self._gated:
            self._gated = False
        else:
            self._gate()
        self._unsure = True
        admission = self.residency.admit(layer, rows, left)
        self._unsure = bool(admission.missing or admission.late)
        phase.hits[layer] += admission.hits
        phase.late_hits[layer] += len(admission.late)
        if missing := admission.missing:
            spent = link.seconds
            self._pending = link.start(layer, missing)
            phase.stall_seconds += link.seconds - spent
            phase.misses[layer] += len(missing)
            phase.bytes_demand += len(missing) * self._block_bytes
        if self._predictor is not None and not self._resting:
            self._hear(layer, rows, ahead)
            if prefetcher is not None:
                needed = distinct(rows)
                prefetcher.served(layer, needed, admission)
                self._plan(layer, needed)
            self._read_ahead(layer)
        if self._lingers and self._arrivals is not None:
            self._arrivals.follow(layer, later, distinct(rows))
        return admission

    def fetch_left(self, rows: Sequence[Sequence[int]], admission: Admission, experts: Sequence[int]) -> None:
        """Copy after all some `experts` that the last `ask`, for these `rows`, was told to leave; `complete` has
        followed it."""
        link, phase, layer = self.link, self.stats.decode, self._layer
        self._unsure = True
        spent = link.seconds
        self._gate()
        absent = self.residency.absent(layer, experts)
        if self._arrivals is not None:
            waiting = [expert for expert in experts if (layer, expert) in self.residency.in_flight]
            self._wait(self._arrivals, waiting)
        if absent:
            self.residency.admit_left(layer, rows, admission, absent)
            link.finish(link.start(layer, absent), admission.missing_slots[-len(absent) :])
        self._unsure = False
        phase.stall_seconds += link.seconds - spent
        phase.misses[layer] += len(absent)
        phase.bytes_demand += len(absent) * self._block_bytes

    def complete(self, admission: Admission) -> None:
        """Wait until all that the last `ask` answered is in its slots."""
        link, began = self.link, self._now()
        spent = link.seconds
        if admission.late and self._arrivals is not None:
            self._wait(self._arrivals, admission.late)
        if self._pending is not None:
            link.finish(self._pending, admission.missing_slots)
            self._pending = None
        self._unsure = False
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
        self._make_sure()
        if self._trial is not None:
            self._trial.pause()
        spent = link.seconds
        if self._arrivals is not None:
            self._arrivals.drain()
            self._count_prefetches(self._arrivals.begun)
        self._unsure = True
        waves, hits, misses = prompt_waves(residency, layer, counts, wave_size=self._wave_size)
        phase.hits[layer] += hits
        phase.misses[layer] += misses
        phase.bytes_demand += misses * self._block_bytes
        if self._below is not None:
            self._below.prompt(layer, [expert for wave in waves for expert in wave.experts])
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
        self._unsure = False
        residency.policy.on_prompt(layer, counts)
        if self._below is not None:
            self._below.end_prompt(layer, counts)
        phase.stall_seconds += link.seconds - spent

    def end_run(self) -> None:
        """No step follows for now: what is queued will not be fetched. `stats` gets the reports of the run."""
        if self._arrivals is not None:
            self._arrivals.gate()
            self._count_prefetches(self._arrivals.begun)
        if self._below is not None:
            self._below.end_run()
        if self._trial is not None:
            self._trial.pause()
        self._report()

    def forget(self) -> None:
        """What the slots hold is lost."""
        self._unsure = True

    def _make_sure(self) -> None:
        """Where the last run broke off after slots were given out and before they were filled, by an error of the link
        or an interruption, nobody knows what they hold: forget all of it."""
        if not self._unsure:
            return
        if isinstance(self.link, PrefetchLink):
            self.link.abandon()
        for key in self.residency.in_flight:
            self.residency.cancel(*key)
        self.residency.clear()
        if self._below is not None:
            self._below.abandon()
        self._pending, self._unsure = None, False

    def _gate(self) -> None:
        """A layer is about to ask."""
        if self._arrivals is not None:
            self._arrivals.gate()
            self._count_prefetches(self._arrivals.begun)
        if self._below is not None:
            self._below.gate()

    def _foresee(
        self,
        predictor: Predictor,
        tokens: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None,
        diversity: float | None,
        paths: UInt8[np.ndarray, "L E"] | None,
        following: UInt8[np.ndarray, "L E"] | None,
    ) -> None:
        """What a predictor and those who listen to it do at the beginning of a step."""
        policy, prefetcher = self.residency.policy, self._prefetcher
        predictor.on_step(tokens)
        if paths is not None:
            predictor.on_paths(paths, following)
        scores = predictor.step_scores()
        if not math.isfinite(float(scores.sum())):
            raise PredictorError("its probabilities are not numbers")
        if prefetcher is not None:
            prefetcher.begin_step(len(tokens), diversity)
            policy.on_horizon(prefetcher.horizons.mean)
            if self._timeline is not None:
                self._timeline.counter("horizon", self._now(), prefetcher.horizons.mean)
        if ahead is not None:
            self._listen(-1, ahead)
            predictor.on_ahead(-1, ahead)
        if policy.wants_predictions:
            policy.on_predict(scores if ahead is None else predictor.step_scores())
        if ahead is not None or paths is not None:
            if prefetcher is not None:
                prefetcher.gate()
                self._plan(-1, ())
            if self._below is not None:
                self._below.gate()
                self._read_ahead(-1)

    def _hear(self, layer: int, rows: Sequence[Sequence[int]], ahead: UInt8[np.ndarray, "distances E"] | None) -> None:
        """The predictor, and those who listen to it, hear of a layer."""
        if self._resting or (predictor := self._predictor) is None:
            return
        policy = self.residency.policy
        try:
            if ahead is not None:
                self._listen(layer, ahead)
                predictor.on_ahead(layer, ahead)
            predictor.on_route(layer, rows)
            if ahead is not None and policy.wants_predictions:
                policy.on_ahead(layer, predictor.ahead(layer, self.residency.layers))
        except Exception as error:
            self._give_up(error)
        if self._accuracy is not None:
            self._accuracy.on_route(layer, rows)

    def _listen(self, layer: int, ahead: UInt8[np.ndarray, "distances E"]) -> None:
        """Keep what was predicted, to measure it."""
        if self._accuracy is None:
            self._accuracy = Accuracy(layers=self.residency.layers, distances=len(ahead) - 1)
            self._accuracy.on_step()
        self._accuracy.on_ahead(layer, ahead)

    def _plan(self, layer: int, needed: Sequence[int]) -> None:
        """Queue prefetches, if there is still somebody to go by and it is worth it."""
        if self._prefetcher is None or self._predictor is None:
            return
        if self._trial is not None and not self._trial.on:
            self._prefetcher.skip()
        else:
            try:
                self._prefetcher.plan(layer, needed)
            except PredictorError as error:
                self._give_up(error)

    def _read_ahead(self, layer: int) -> None:
        """Have blocks read from disk that layers after this one are likely to ask for."""
        if self._below is None or self._predictor is None:
            return
        try:
            self._below.plan(layer)
        except PredictorError as error:
            self._give_up(error)

    def _wait(self, arrivals: Arrivals[Blocks], late: Sequence[int]) -> None:
        """Wait for blocks under way; those whose copy has failed are copied on demand."""
        link, layer, phase = self.link, self._layer, self.stats.decode
        if not (failed := arrivals.wait(layer, late)):
            return
        slots = self.residency.waiting(layer, failed)
        link.finish(link.start(layer, failed), slots)
        for expert in failed:
            self.residency.arrive(layer, expert, used=True)
        phase.late_hits[layer] -= len(failed)
        phase.misses[layer] += len(failed)
        phase.bytes_demand += len(failed) * self._block_bytes

    def _give_up(self, error: Exception) -> None:
        """The predictor is not asked again."""
        said = f"{type(error).__name__}: {error}" if not isinstance(error, PredictorError) else str(error)
        self._off_because = f"the predictor {type(self._predictor).__name__} failed, {said:.200}"
        self._predictor = None

    def _report(self) -> None:
        """Bring the reports of `stats` up to date."""
        if self._prefetcher is not None:
            because, report = self._off_because, self._prefetcher.report()
            if self._trial is not None:
                because, report["trial"] = because or self._trial.because or None, self._trial.report()
            self.stats.horizon = {"off_because": because, **report}
        elif self._predictor is not None or self._off_because != "it is off":
            self.stats.horizon = {"off_because": self._off_because}
        if self._accuracy is not None:
            self.stats.recall = self._accuracy.report()

    def _count_prefetches(self, begun: int) -> None:
        """`begun` prefetches have begun in all. Those, and those that left their slots unused, since last asked."""
        phase, wasted = self.stats.decode, sum(self.residency.wasted)
        phase.bytes_prefetch += (begun - self._prefetches) * self._block_bytes
        phase.bytes_wasted += (wasted - self._wasted) * self._block_bytes
        self._prefetches, self._wasted = begun, wasted
