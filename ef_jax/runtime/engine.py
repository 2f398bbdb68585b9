"""The engine of one device: experts served from its slots as the routers ask for them."""

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
from ef_jax.runtime.layer_passes import routed_rows
from ef_jax.runtime.look_ahead import LookAhead
from ef_jax.runtime.miss_handlers import MissError, MissHandler
from ef_jax.runtime.programs import Programs
from ef_jax.runtime.routing_paths import RoutingPaths
from ef_jax.runtime.rows import Rows
from ef_jax.runtime.sequence_engine import SequenceEngine
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.host_tier import HostTier
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.schedule.token_order import Order, run_there_first
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.timeline import COMPUTE


class Engine(SequenceEngine):
    """Runs sequences on one device; see `SequenceEngine`."""

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
        self.link, self.device, self.order, self.miss_handlers = link, device, order, miss_handlers
        sharding = jax.sharding.SingleDeviceSharding(device)
        stats = Stats.empty(
            layers=len(spec.moe_layers),
            experts=spec.total_experts,
            slots=plan.slots,
            staging_slots=plan.staging_slots,
            lossy=lossy.as_dict(),
        )
        self.scheduler: Scheduler[Any] = Scheduler(
            residency,
            link,
            stats,
            block_bytes=plan.block_bytes,
            wave_size=MAX_INSERT,
            predictor=predictor,
            prefetch=prefetching.prefetch,
            candidates=candidates,
            most_wasted=most_wasted,
            lingers=any(handler.lingers for handler in miss_handlers),
            below=below,
        )
        super().__init__(
            spec,
            plan,
            programs,
            dense,
            rows=Rows(spec, rows=plan.rows, batch=plan.batch, context=plan.context, sharding=sharding),
            reaches=jax.device_put([reach_of(layer) for layer in spec.layers], sharding),
            stats=stats,
            scheduler=self.scheduler,
            look_ahead=look_ahead,
            routing_paths=routing_paths,
            off_because=prefetching.off_because,
            lossy=lossy,
        )
        chosen = plan.batch * spec.experts.top_k
        self._no_outputs = jnp.zeros((chosen, spec.hidden), jnp.dtype(spec.dtype), device=sharding)

    @property
    def residency(self) -> Residency:
        """Which block is in which slot."""
        return self.scheduler.residency

    def rest(self) -> None:
        """See `SequenceEngine`."""
        super().rest()
        for handler in self.miss_handlers:
            self.stats.miss = {**(self.stats.miss or {}), **handler.report()} or None

    def _recover_slots(self) -> bool:
        return self.link.pool.restore()

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

    def _serve_prompt(self, width, absorb, index: int, carried):  # type: ignore[no-untyped-def]
        """Outputs of every routed row of MoE layer `index`, wave by wave; a trained predictor hears of its routes."""
        wave = self.lookout.running.wave(width)
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

    def _note_peak(self) -> None:
        live = live_bytes(self.device)
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, live + self.lookout.programs.temp_bytes)
