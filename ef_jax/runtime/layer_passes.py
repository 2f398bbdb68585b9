"""The passes of an engine: layer after layer, with experts served from slots as the routers ask for them."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.errors import LinkError
from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.program_memory import live_bytes
from ef_jax.memory.residency import Residency
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.nn import reach_of
from ef_jax.predict import Predictor
from ef_jax.prefetching import NO_PREFETCHING, Prefetching
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.look_ahead import LookAhead
from ef_jax.runtime.lookout import Lookout
from ef_jax.runtime.miss_handlers import MissError, MissHandler
from ef_jax.runtime.programs import Programs
from ef_jax.runtime.recorder import Listener
from ef_jax.runtime.routing_paths import RoutingPaths
from ef_jax.runtime.rows import Rows
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.host_tier import HostTier
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.schedule.token_order import Order, run_there_first
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.timeline import COMPUTE, Timeline


class LayerPasses:
    """What an engine holds, and how one pass of sequences, chunks of prompts or a decode step, goes through its layers.

    Python decides over ids; compiled programs hold the arrays.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        programs: Programs,
        dense: DenseWeights,
        residency: Residency,
        link: DeviceLink | EmulatedLink,
        device: jax.Device,
        *,
        look_ahead: LookAhead | None = None,
        routing_paths: RoutingPaths | None = None,
        predictor: Predictor | None = None,
        prefetching: Prefetching = NO_PREFETCHING,
        candidates: str = "value",
        most_wasted: float = 1.0,
        order: Order = "auto",
        below: HostTier | None = None,
        miss_handlers: Sequence[MissHandler] = (),
        lossy: LossyOptions = LOSSLESS,
    ) -> None:
        self.spec, self.plan, self.link, self.device = spec, plan, link, device
        self.lookout = Lookout(spec, programs, look_ahead)
        self.routing_paths, self.order, self.miss_handlers = routing_paths, order, miss_handlers
        self._off_because = prefetching.off_because
        self.stats = Stats.empty(
            layers=len(spec.moe_layers),
            experts=spec.total_experts,
            slots=plan.slots,
            staging_slots=plan.staging_slots,
            lossy=lossy.as_dict(),
        )
        self.recorder: Listener | None = None
        self.timeline: Timeline | None = None
        self._served_at = 0.0
        self._dense = dense
        self._rows = Rows(spec, rows=plan.rows, batch=plan.batch, context=plan.context, device=device)
        reaches = [reach_of(layer) for layer in spec.layers]
        self._reaches: list[jax.Array] = jax.device_put(reaches, self._rows.sharding)
        self._moe_index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._prompt_layers, self._step_layers = spec.prompt_layers, spec.step_layers
        self._first_token = spec.decoder_start or 0  # of a decoder with an encoder
        self._fed: tuple[list[int], jax.Array] | None = None  # tokens as the last head left them, and their rows
        self._age_order: list[int] | None = None  # places of a step's sequences, the oldest first; None: as they stand
        self._resting = True
        self._drops, self._lifts = lossy.adaptive_experts is not None, lossy.cache_bias is not None
        dtype, chosen = jnp.dtype(spec.dtype), plan.batch * spec.experts.top_k
        self._last = jnp.zeros((plan.batch, spec.hidden), dtype, device=self._rows.sharding)
        self._no_outputs = jnp.zeros((chosen, spec.hidden), dtype, device=self._rows.sharding)
        self.scheduler: Scheduler[Any] = Scheduler(
            residency,
            link,
            self.stats,
            block_bytes=plan.block_bytes,
            wave_size=MAX_INSERT,
            predictor=predictor,
            prefetch=prefetching.prefetch,
            candidates=candidates,
            most_wasted=most_wasted,
            lingers=any(handler.lingers for handler in miss_handlers),
            below=below,
        )

    @property
    def residency(self) -> Residency:
        """Which block is in which slot."""
        return self.scheduler.residency

    def _layers(self, width, span, tokens, positions, index, serve):  # type: ignore[no-untyped-def]
        """Every layer of a pass; `serve(layer, carried)` sees to the experts of each MoE layer. Returns the last's."""
        rows, reaches, lookout = self._rows, self._reaches, self.lookout
        layers, finish = self._dense.layers, self._dense.finish
        before, *others = self._step_layers if width == 1 else self._prompt_layers
        run = lookout.running.layers(width, span)
        lifts = self._lifts and width == 1
        if self.recorder is not None:
            of_place = np.arange(rows.count) if index is None else np.minimum(index, rows.count - 1)
            serve = self.recorder.listen(serve, tokens, positions, rows.number[of_place])
        self._served_at = time.perf_counter()
        carried, rows.caches[before], ahead, places = run[0](
            self._dense.top,
            tokens,
            layers[before],
            rows.caches[before],
            reaches[before],
            (positions, index),
            *lookout.from_layer(before, width),
            *(self._held(before) if lifts else ()),
        )
        lookout.hear(ahead)
        for program, layer in zip(run[1:], others, strict=True):
            if before in self._moe_index:
                carried = serve(self._moe_index[before], carried)
                self._served_at = time.perf_counter()
            carried, rows.caches[layer], ahead = program(
                finish[before],
                carried,
                layers[layer],
                rows.caches[layer],
                reaches[layer],
                places,
                *lookout.from_layer(layer, width),
                *(self._held(layer) if lifts else ()),
            )
            lookout.hear(ahead)
            before = layer
        if before in self._moe_index:
            carried = serve(self._moe_index[before], carried)
            self._served_at = time.perf_counter()
        return carried

    def _serve(self, deferred, index: int, routed: Routed):  # type: ignore[no-untyped-def]
        """Have every expert that MoE layer `index` chose in a slot; a layer that cannot miss is not read back."""
        scheduler, residency, link = self.scheduler, self.residency, self.link
        outputs = self._no_outputs
        if scheduler.cannot_miss(index):
            deferred.append((index, routed.ids))
            return routed, link.pool.array, residency.slot_of[index].copy(), outputs
        try:
            report = self.lookout.report(self.plan.batch)
            if report is None:
                rows, bins = routed_rows(routed.ids, dropping=self._drops), None
            else:
                rows, bins = report.ids, report.bins
            weights = None if report is None else report.weights
        except RuntimeError as error:
            # JAX's: a copy that nobody waited for may have failed, and what reads it fails too.
            raise LinkError(f"what led to layer {index} has failed: {str(error).splitlines()[0]:.200}") from error
        self._note(COMPUTE, f"layer {index}", self._served_at)
        kept = self._offer(index, rows, weights) if self.miss_handlers else ()
        left = [expert for _, experts in kept for expert in experts]
        later = [expert for handler, experts in kept if handler.lingers for expert in experts]
        admission = scheduler.ask(index, self._by_age(rows), bins, left=left, later=later)
        if not (admission.missing or admission.late or left):
            return routed, link.pool.array, residency.slot_row(index, admission), outputs
        free = sum(len(experts) for handler, experts in kept if handler.free)
        first = run_there_first(self.order, admission, link, free=free)
        if not (first or left):
            scheduler.complete(admission)
            return routed, link.pool.array, residency.slot_row(index, admission), outputs
        done = residency.slot_row(index, admission)
        done[[*admission.missing, *admission.late] if first else slice(None)] = -1
        if first:
            began = time.perf_counter()
            outputs = self.lookout.running.there()(routed, link.pool.array, done, outputs)
            self._note(COMPUTE, f"layer {index}, resident rows", began)
        outputs, failed = self._run_kept(index, routed, kept, outputs)
        scheduler.complete(admission)
        if failed:
            scheduler.fetch_left(self._by_age(rows), admission, failed)
        rest = residency.slot_row(index, admission)
        rest[done >= 0] = -1
        return routed, link.pool.array, rest, outputs

    def _offer(
        self, index: int, rows: list[list[int]], weights: list[list[float]] | None
    ) -> list[tuple[MissHandler, list[int]]]:
        """Which handler keeps which absent experts of a layer."""
        kept, absent = [], self.scheduler.absent(index, rows)
        for handler in self.miss_handlers:
            if absent and (experts := handler.keep(index, rows, absent, weights)):
                kept.append((handler, experts))
                absent = [expert for expert in absent if expert not in experts]
        return kept

    def _run_kept(self, index, routed, kept, outputs):  # type: ignore[no-untyped-def]
        """Have handlers see to what they kept: the outputs, and the experts that must be copied after all."""
        failed: list[int] = []
        link, phase = self.link, self.stats.decode
        for handler, experts in kept:
            began, waited = time.perf_counter(), link.seconds
            try:
                outputs = handler.run(index, routed, experts, outputs)
                getattr(phase, handler.counter)[index] += len(experts)
                phase.bytes_low_precision += len(experts) * handler.block_bytes
            except MissError:
                failed += experts
            phase.stall_seconds += link.seconds - waited
            self._note(COMPUTE, f"layer {index}, experts {experts} by {type(handler).__name__}", began)
        return outputs, failed

    def _serve_prompt(self, wave, absorb, index: int, carried):  # type: ignore[no-untyped-def]
        """Outputs of every routed row of MoE layer `index`, wave by wave; a trained predictor hears of its routes."""
        routed, rows, outputs = carried
        if absorb is not None:
            absorb(index, routed.ids)
        counts = np.asarray(rows.sizes)
        self._note(COMPUTE, f"prompt, layer {index}", self._served_at)
        for part in self.scheduler.serve_prompt(index, counts):
            began = time.perf_counter()
            outputs = wave(rows, outputs, self.link.pool.array, part.slot_row)
            self._note(COMPUTE, f"prompt, wave of layer {index}", began)
        return routed, rows.order, outputs

    def _held(self, layer: int) -> tuple[np.ndarray, ...]:
        """Argument "held" of the program that ends in a decoder layer; none for a dense one."""
        index = self._moe_index.get(layer)
        return () if index is None else (self.residency.held(index),)

    def _by_age(self, rows: list[list[int]]) -> list[list[int]]:
        """What the sequences of a step chose, the oldest sequence first."""
        return rows if self._age_order is None else [rows[place] for place in self._age_order]

    def _note(self, track: str, name: str, began: float) -> None:
        if self.timeline is not None:
            self.timeline.span(track, name, began, time.perf_counter())

    def _note_peak(self) -> None:
        live = live_bytes(self.device)
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, live + self.lookout.programs.temp_bytes)


def routed_rows(ids: Any, *, dropping: bool = False) -> list[list[int]]:
    """The experts of each active sequence of a step, `[B, 1, K]`, without -1 where a run is `dropping` some; waits for
    them."""
    rows = [row for row in np.asarray(ids)[:, 0].tolist() if row[0] >= 0]
    return [[expert for expert in row if expert >= 0] for row in rows] if dropping else rows
