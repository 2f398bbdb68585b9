"""One replay of a sweep at a time: by a policy, for a bound of hits, or for a bound of stalls."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from ef_jax.errors import InputError
from ef_jax.memory.residency import Residency
from ef_jax.replay.belady import belady
from ef_jax.replay.layer_steps import PROMPT, LayerSteps, layer_steps
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.simulator import simulate
from ef_jax.replay.stall_bound import StallBound, stall_bound
from ef_jax.replay.trace import Pass, RoutingTrace
from ef_jax.replay.window_loads import WindowLoads, window_loads
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Prefetch
from ef_jax.stats import PhaseStats
from ef_jax.timeline import Timeline

BOUNDS = ("belady", "belady_bypass")

OnPass = Callable[[Pass, Residency], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings:
    """What all replays of a sweep have in common.

    Attributes:
      batch: sequences side by side; None: as recorded.
      fit: the first sequences of the trace run, and teach the policies, but are not counted.
      block_bytes: bytes of one expert's block; None: the trace's.
      links: the links to replay over; none: only hits and misses are counted.
      layer_seconds: compute time of one layer of a step.
      predictor: a name of `simulator.PREDICTORS`.
      prefetch: as for `Scheduler`.
    """

    batch: int | None = None
    fit: int = 0
    block_bytes: int | None = None
    links: tuple[LinkModel, ...] = ()
    layer_seconds: float = 0.0
    predictor: str = "none"
    prefetch: Prefetch = "off"


class Task(NamedTuple):
    """One replay: a policy or a bound of hits over a link or none; without a policy, the bound of stalls."""

    policy: str | None
    slots: int
    link: LinkModel | None


class Outcome(NamedTuple):
    """What a replay came to; `stalls` is of the bound of stalls, which counts nothing."""

    phase: PhaseStats
    stalls: StallBound | None
    seconds: float


class Replays:
    """Runs replays over one trace.

    Args:
      trace: recorded routing.
      settings: what all replays have in common.

    Raises:
      InputError: settings that do not fit the trace.
    """

    def __init__(self, trace: RoutingTrace, settings: SweepSettings) -> None:
        if not 0 <= settings.fit < trace.sequences:
            raise InputError(f"fit {settings.fit}: leave at least one of the {trace.sequences} sequences to be counted")
        block_bytes = settings.block_bytes or trace.block_bytes
        if settings.links and block_bytes is None:
            raise InputError("the trace does not say how large an expert's block is, and a link needs it: give it")
        self.trace = dataclasses.replace(trace, block_bytes=block_bytes, weights=None)
        if settings.predictor.startswith("pregate"):
            PregateBins(trace)  # has scores
        else:
            self.trace = dataclasses.replace(self.trace, pregate=None)
        self.settings = settings
        self._fewest_loads: dict[int, WindowLoads] = {}  # by slots, for every link
        counted = self.trace.select(settings.fit)
        _, bounds, prompt = counted.order(settings.batch)
        self._steps, self._tokens = int((~prompt).sum()), int(np.diff(bounds)[~prompt].sum())
        if not self._steps:
            raise InputError("the trace has no step of decoding to count: give a batch to replay prompts as steps")

    def run(self, task: Task) -> Outcome:
        """One replay."""
        began = time.perf_counter()
        stalls = None
        if task.policy is None:
            phase, stalls = PhaseStats.empty(self.trace.layers), self._stalls(task)
        elif task.policy in BOUNDS:
            phase = self._bound(task)
        else:
            phase = self._simulate(task.policy, task)
        return Outcome(phase, stalls, time.perf_counter() - began)

    def residency(self, policy: str, slots: int, link: LinkModel | None = None) -> Float64[np.ndarray, "L E"]:
        """Share of the counted steps of decoding after which each key was resident."""
        resident = np.zeros((self.trace.layers, self.trace.num_experts), np.int64)

        def observe(step: Pass, residency: Residency) -> None:
            if not step.prompt:
                np.add(resident, residency.slot_of >= 0, out=resident)

        self._simulate(policy, Task(policy, slots, link), observe)
        return resident / self._steps

    def timeline(self, policy: str, slots: int, link: LinkModel) -> Timeline:
        """What ran when in the counted passes, in virtual seconds."""
        timeline = Timeline()
        self._simulate(policy, Task(policy, slots, link), timeline=timeline)
        return timeline

    def _simulate(
        self, policy: str, task: Task, on_pass: OnPass | None = None, timeline: Timeline | None = None
    ) -> PhaseStats:
        settings = self.settings
        stats = simulate(
            self.trace,
            slots=task.slots,
            policy=policy,
            batch=settings.batch,
            fit=settings.fit,
            link=task.link,
            compute_seconds=settings.layer_seconds,
            predictor=settings.predictor,
            prefetch=settings.prefetch,
            timeline=timeline,
            on_pass=on_pass,
        )
        return stats.decode

    def _bound(self, task: Task) -> PhaseStats:
        steps, count_from = self._layer_steps
        if task.slots == steps.num_keys:
            # As in an engine, which then loads every expert before it starts.
            layers, sizes = steps.layers[count_from:], np.diff(steps.starts)[count_from:]
            decode = layers != PROMPT
            needed = np.bincount(layers[decode], sizes[decode], minlength=steps.num_layers)
            hits, misses = needed.astype(np.int64).tolist(), [0] * steps.num_layers
        else:
            count = belady(steps, task.slots, bypass=task.policy == "belady_bypass", count_from=count_from)
            hits, misses = count.hits, count.misses
        phase = PhaseStats(hits=hits, late_hits=[0] * steps.num_layers, misses=misses)
        phase.steps, phase.tokens = self._steps, self._tokens
        phase.bytes_demand = sum(misses) * (self.trace.block_bytes or 0)
        return phase

    def _stalls(self, task: Task) -> StallBound:
        link, block_bytes = task.link, self.trace.block_bytes
        if link is None or block_bytes is None:
            raise InputError("a bound of stalls needs a link and the bytes of an expert's block: give both")
        steps, count_from = self._layer_steps
        places = task.slots + steps.widest
        if places not in self._fewest_loads:
            self._fewest_loads[places] = window_loads(steps, places, count_from=count_from)
        return stall_bound(
            steps,
            task.slots,
            block_bytes=block_bytes,
            bandwidth=link.bandwidth,
            layer_seconds=self.settings.layer_seconds,
            block_overhead=link.block_overhead,
            staging=steps.widest,
            count_from=count_from,
            fewest=self._fewest_loads[places],
        )

    @functools.cached_property
    def _layer_steps(self) -> tuple[LayerSteps, int]:
        """The layer-steps of the whole trace, and the one from which on they are counted."""
        fit, batch = self.settings.fit, self.settings.batch
        counted = layer_steps(self.trace.select(fit), batch)
        if not fit:
            return counted, 0
        taught = layer_steps(self.trace.select(0, fit), batch)
        return taught.followed_by(counted), len(taught)
