"""Replays: a trace's passes through the residency, policy, predictor and scheduler that the engine runs."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from ef_jax.errors import InputError
from ef_jax.memory.policies import Policy, make_policy
from ef_jax.memory.policies.static import Static
from ef_jax.memory.residency import Residency
from ef_jax.predict import History, Oracle, PredictionCache, Predictor, Pregate
from ef_jax.predict.log_odds import union_bins
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.simulated_link import FreeLink, SimulatedLink
from ef_jax.replay.trace import Pass, RoutingTrace
from ef_jax.replay.virtual_clock import VirtualClock
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Prefetch, Scheduler
from ef_jax.stats import Stats
from ef_jax.timeline import COMPUTE, STEPS, Timeline

PREDICTORS = ("none", "history", "pregate", "oracle", "history+cache", "pregate+cache")
"""A name with "+cache" puts a `PredictionCache` before the predictor."""


def simulate(
    trace: RoutingTrace,
    *,
    slots: int,
    policy: str | Policy = "lru",
    batch: int | None = None,
    fit: int = 0,
    staging_slots: int | None = None,
    block_bytes: int | None = None,
    link: LinkModel | None = None,
    compute_seconds: float | Sequence[float] = 0.0,
    prompt_seconds: float | Sequence[float] = 0.0,
    predictor: str | Predictor = "none",
    prefetch: Prefetch = "off",
    candidates: str = "value",
    most_wasted: float = 1.0,
    bins: np.ndarray | None = None,
    paths: np.ndarray | None = None,
    timeline: Timeline | None = None,
    on_pass: Callable[[Pass, Residency], None] | None = None,
) -> Stats:
    """What an engine with `slots` cache slots would have counted had it run the passes of a trace.

    Args:
      trace: recorded routing.
      slots: cache slots, 1 to L * E; with L * E, every expert is in its slot from the beginning, as in the engine.
      policy: who leaves the cache: a name, or a policy of this model's shape.
      batch: sequences side by side, see `RoutingTrace.order`; None: as recorded.
      fit: the first sequences run, and teach policy and predictor, but are not counted; `static` takes its hot set
        from them.
      staging_slots: slots of the staging ring; None: as many as the largest step can need.
      block_bytes: bytes of one expert block; None: the trace's. Without either bytes count as 0, and a link has
        nothing to go by.
      link: the link's figures. None: copies take no time, and nothing is timed.
      compute_seconds: virtual seconds from one layer's routing to the next layer's in a step: one figure, or one a
        layer; see `compute_seconds_per_layer`. Half of the last one's pass after the next step has begun.
      prompt_seconds: the same in a prompt's chunk; the waves of a layer share them by their rows.
      predictor: a name of `PREDICTORS`, or an object. It hears pre-gate bins if `bins` are given, or if it is called
        "pregate" and the trace has scores.
      prefetch: as for `Scheduler`; anything but "off" needs a predictor and a link.
      candidates: as for `Scheduler`.
      most_wasted: as for `Scheduler`.
      bins: uint8 `[N, L, H+1, E]`, what the pre-gate says at each row, see `PregateBins`; corrected scores, say. None:
        the trace's scores.
      paths: uint8 `[N, L, E]`, bins of what each row's token is predicted to use in all layers, for rows that are
        decoded; a predictor hears of a step what any of its rows is, see `Predictor.on_paths`. None: no paths.
      timeline: hears of what is counted, in virtual seconds; needs a link.
      on_pass: called after each pass that is counted.

    Raises:
      InputError: a setting that the trace or the other settings do not allow.
    """
    if not 0 <= fit < trace.sequences:
        raise InputError(f"fit {fit}: leave at least one of the {trace.sequences} sequences to be counted")
    parts = [trace.select(0, fit), trace.select(fit)] if fit else [trace]
    shape = (trace.count, trace.layers, trace.num_experts)
    if paths is not None and (paths.dtype != np.uint8 or paths.shape != shape):
        raise InputError(f"paths are {paths.dtype} of shape {paths.shape}, and the trace needs uint8 of shape {shape}")
    said = None
    if bins is not None or (isinstance(predictor, str) and predictor.startswith("pregate")):
        said = PregateBins(trace, bins)
    replay = Replay(
        layers=trace.layers,
        experts=trace.num_experts,
        slots=slots,
        staging_slots=_widest(trace, batch) if staging_slots is None else staging_slots,
        policy=policy,
        block_bytes=trace.block_bytes if block_bytes is None else block_bytes,
        link=link,
        compute_seconds=compute_seconds,
        prompt_seconds=prompt_seconds,
        predictor=predictor
        if not isinstance(predictor, str)
        else make_predictor(predictor, parts, batch=batch, distances=said.distances if said is not None else 0),
        prefetch=prefetch,
        candidates=candidates,
        most_wasted=most_wasted,
    )
    made = replay.residency.policy
    if fit and policy == "static" and isinstance(made, Static):
        made.choose(_uses(parts[0]))
    for part, first in zip(parts, (0, parts[0].count), strict=False):
        replay.stats.reset()
        if timeline is not None and part is parts[-1]:
            replay.show(timeline)
        for step in part.steps(batch):
            rows = [first + row for row in step.rows]
            ahead = None if said is None or step.prompt else said.of_step(rows)
            replay.run(step, ahead, None if paths is None or step.prompt else union_bins(paths[rows]))
            if on_pass is not None and part is parts[-1]:
                on_pass(step, replay.residency)
        replay.end_run()
    return replay.stats


def make_predictor(
    name: str, parts: Sequence[RoutingTrace], *, batch: int | None, distances: int = 0
) -> Predictor | None:
    """The predictor called `name` for a replay of some traces, one after another; None for "none".

    Args:
      name: one of `PREDICTORS`.
      parts: the traces.
      batch: as for `simulate`.
      distances: for which it will hear bins.

    Raises:
      InputError: no such predictor.
    """
    if name not in PREDICTORS:
        raise InputError(f"predictor {name!r:.60} is not one of {', '.join(PREDICTORS)}")
    shape = {"layers": parts[0].layers, "experts": parts[0].num_experts}
    name, _, cache = name.partition("+")
    predictor: Predictor
    if name == "history":
        predictor = History(**shape)
    elif name == "pregate":
        predictor = Pregate(**shape, top_k=parts[0].top_k, distances=distances)
    elif name == "oracle":
        steps = itertools.chain.from_iterable(part.steps(batch) for part in parts)
        predictor = Oracle((step.routes for step in steps if not step.prompt), **shape)
    else:
        return None
    return PredictionCache(predictor) if cache else predictor


def compute_seconds_per_layer(stats: Stats) -> float:
    """What an engine run says of `compute_seconds`: its decode time without stalls, over steps and layers.

    Raises:
      InputError: nothing was decoded.
    """
    phase = stats.decode
    if not phase.steps:
        raise InputError("nothing was decoded, so a layer's compute time is not known: generate some tokens first")
    return max(0.0, phase.seconds - phase.stall_seconds) / (phase.steps * stats.layers)


class Replay:
    """One simulated engine; `simulate` says what the settings mean.

    Attributes:
      stats: what was counted.
      residency: which block is in which slot.
      now: virtual seconds since the beginning.
    """

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        slots: int,
        staging_slots: int,
        policy: str | Policy = "lru",
        block_bytes: int | None = None,
        link: LinkModel | None = None,
        compute_seconds: float | Sequence[float] = 0.0,
        prompt_seconds: float | Sequence[float] = 0.0,
        predictor: Predictor | None = None,
        prefetch: Prefetch = "off",
        candidates: str = "value",
        most_wasted: float = 1.0,
    ) -> None:
        if not 1 <= slots <= layers * experts:
            raise InputError(f"{slots} slots: give 1 to {layers * experts}, the number of experts")
        if isinstance(policy, str):
            policy = make_policy(policy, layers=layers, experts=experts, cache_slots=slots)
        elif (policy.layers, policy.experts) != (layers, experts):
            raise InputError(
                f"the policy is for {policy.layers} layers of {policy.experts} experts, and the trace has {layers} "
                f"layers of {experts}"
            )
        self._step_seconds = _by_layer("compute_seconds", compute_seconds, layers)
        self._prompt_seconds = _by_layer("prompt_seconds", prompt_seconds, layers)
        self._clock = VirtualClock()
        self._timeline: Timeline | None = None
        self._link: SimulatedLink | None = None
        if link is not None:
            if not block_bytes:
                raise InputError("the trace does not say how large an expert's block is: give block_bytes")
            self._link = SimulatedLink(link, self._clock, block_bytes=block_bytes)
        elif prefetch not in ("off", 0):
            raise InputError(f"prefetch {prefetch!r} needs a link: give its bandwidth, or prefetch off")
        self.stats = Stats.empty(layers=layers, experts=layers * experts, slots=slots, staging_slots=staging_slots)
        self.residency = Residency(
            layers=layers, experts=experts, cache_slots=slots, staging_slots=staging_slots, policy=policy
        )
        if slots == layers * experts:
            for layer in range(layers):
                self.residency.seed(layer, range(experts))
        self._scheduler: Scheduler = Scheduler(
            self.residency,
            self._link or FreeLink(),
            self.stats,
            block_bytes=block_bytes or 0,
            wave_size=experts,
            predictor=predictor,
            prefetch=prefetch,
            candidates=candidates,
            most_wasted=most_wasted,
            trial=False,  # nothing but the link takes time
            now=lambda: self._clock.now,
        )

    def show(self, timeline: Timeline) -> None:
        """What runs from now on is noted in `timeline`.

        Raises:
          InputError: there is no link, so nothing takes time.
        """
        if self._link is None:
            raise InputError("a timeline needs a link: give its bandwidth")
        self._timeline = timeline
        self._scheduler.show(timeline)

    def run(
        self,
        step: Pass,
        ahead: UInt8[np.ndarray, "L distances E"] | None = None,
        paths: UInt8[np.ndarray, "L E"] | None = None,
        *,
        following: UInt8[np.ndarray, "L E"] | None = None,
        seconds: Sequence[float] | None = None,
    ) -> None:
        """One pass; of a step of decoding, `ahead` is what the pre-gate says by source, `paths` what its tokens are
        predicted to use, and `following` those of the next step. `seconds` are its layers' compute times; None: those
        of all passes."""
        phase = self.stats.prefill if step.counts is not None else self.stats.decode
        began, busy = self._clock.now, self._busy
        if step.counts is not None:
            self._run_prompt(step.counts, self._prompt_seconds if seconds is None else seconds)
        else:
            self._run_step(step, ahead, paths, following, self._step_seconds if seconds is None else seconds)
        phase.steps += 1
        phase.tokens += len(step.tokens)
        phase.seconds += self._clock.now - began
        phase.link_busy_seconds += self._busy - busy
        if self._timeline is not None:
            self._timeline.span(STEPS, "prompt" if step.prompt else "step", began, self._clock.now)

    def end_run(self) -> None:
        """No pass follows for now."""
        self._scheduler.end_run()

    @property
    def now(self) -> float:
        return self._clock.now

    @property
    def _busy(self) -> float:
        return self._link.busy_seconds if self._link is not None else 0.0

    def _run_step(
        self,
        step: Pass,
        ahead: UInt8[np.ndarray, "L distances E"] | None,
        paths: UInt8[np.ndarray, "L E"] | None,
        following: UInt8[np.ndarray, "L E"] | None,
        by_layer: Sequence[float],
    ) -> None:
        serve, layers = self._scheduler.serve, len(step.routes)
        of_source: list[np.ndarray | None] = [None] * (layers + 1) if ahead is None else [*ahead, None]
        self._scheduler.begin_step(step.tokens, of_source[0], paths=paths, following=following)
        if self._link is None:
            for layer, rows in enumerate(step.routes):
                serve(layer, rows, of_source[layer + 1])
        else:
            *most, last = by_layer
            self._compute("first layer's attention", last / 2)
            for layer, (rows, seconds) in enumerate(zip(step.routes, [*most, last / 2], strict=True)):
                serve(layer, rows, of_source[layer + 1])
                self._compute(f"layer {layer}", seconds)

    def _run_prompt(self, chunk: np.ndarray, by_layer: Sequence[float]) -> None:
        for layer, (counts, seconds) in enumerate(zip(chunk, by_layer, strict=True)):
            rows = counts.sum()
            for wave in self._scheduler.serve_prompt(layer, counts):
                self._compute(f"prompt, layer {layer}", seconds * float(counts[wave.slot_row >= 0].sum() / rows))

    def _compute(self, name: str, seconds: float) -> None:
        began = self._clock.now
        self._clock.advance(seconds)
        if self._timeline is not None:
            self._timeline.span(COMPUTE, name, began, self._clock.now)


def _by_layer(name: str, seconds: float | Sequence[float], layers: int) -> list[float]:
    by_layer = [float(seconds)] * layers if isinstance(seconds, int | float) else [float(each) for each in seconds]
    if len(by_layer) != layers:
        raise InputError(f"{name} has {len(by_layer)} figures for {layers} layers: give one, or one a layer")
    for each in by_layer:
        if not 0 <= each < float("inf"):
            raise InputError(f"{name} {each}: give 0 or more seconds")
    return by_layer


def _uses(trace: RoutingTrace) -> Int64[np.ndarray, "L E"]:
    """How often each key was used."""
    return np.stack(
        [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in range(trace.layers)]
    )


def _widest(trace: RoutingTrace, batch: int | None) -> int:
    """The most distinct experts that a layer of a step can use."""
    _, bounds, prompt = trace.order(batch)
    sequences = int(np.diff(bounds)[~prompt].max(initial=1))
    return min(trace.num_experts, trace.top_k * sequences)
