"""The engine of a mesh: sequences on all devices, experts served from the slots of the device that holds them."""

import time
from typing import Any

import jax
import numpy as np

from ef_jax.errors import LinkError
from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.program_memory import live_bytes
from ef_jax.mesh.exchanged import Exchanged
from ef_jax.mesh.fleet import Fleet, servers_of
from ef_jax.mesh.processes import wait_for_all
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.rows import MeshRows
from ef_jax.mesh.side_by_side import LastWave, SideBySide, local_parts
from ef_jax.nn import reach_of
from ef_jax.placement import Placement
from ef_jax.prefetching import NO_PREFETCHING, Prefetching
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.look_ahead import LookAhead
from ef_jax.runtime.sequence_engine import SequenceEngine
from ef_jax.runtime.steps import SortedRows
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.timeline import COMPUTE


class MeshEngine(SequenceEngine):
    """Runs sequences on a mesh; see `SequenceEngine`. Every process calls the same methods in the same order.

    `spec` is the model as a device has it, `plan` that of one device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        programs: MeshPrograms,
        dense: DenseWeights,
        fleet: Fleet,
        placement: Placement,
        *,
        look_ahead: LookAhead | None = None,
        prefetching: Prefetching = NO_PREFETCHING,
        lossy: LossyOptions = LOSSLESS,
    ) -> None:
        layout = programs.layout
        self.fleet, self._layout, self._mesh_programs = fleet, layout, programs
        self._company = SideBySide(programs, fleet)
        self._mesh_rows = MeshRows(spec, layout, rows=plan.rows, context=plan.context)
        self._serves: list[jax.Array] = [
            layout.put(servers_of(layout, placement, layer), layout.everywhere) for layer in range(len(spec.moe_layers))
        ]
        served = dict(zip(spec.moe_layers, self._serves, strict=True))
        reaches = [
            (layout.put(np.asarray(reach_of(layer)), layout.everywhere), served.get(index))
            for index, layer in enumerate(spec.layers)
        ]
        stats = Stats.empty(
            layers=len(spec.moe_layers),
            experts=plan.experts,
            slots=plan.slots,
            staging_slots=plan.staging_slots,
            lossy=lossy.as_dict(),
        )
        stats.overlap = programs.overlap.as_dict()
        stats.devices = [member.stats for member in fleet.members]
        self._exchanged = Exchanged(spec, layout, placement, programs.transport, plan.rows)
        super().__init__(
            spec,
            plan,
            programs,
            dense,
            rows=self._mesh_rows,
            reaches=reaches,
            stats=stats,
            scheduler=fleet,
            look_ahead=look_ahead,
            off_because=prefetching.off_because,
            lossy=lossy,
        )

    @property
    def repeats(self) -> bool:
        """See `SequenceEngine`; other processes have run their part of a pass, and would not run it again."""
        return jax.process_count() == 1

    def lanes(self, width: int) -> int:
        """See `SequenceEngine`; those of all devices, and of all passes that run side by side."""
        programs = self._mesh_programs
        here = min(programs.lanes(width) * programs.passes(width), programs.rows)
        return here * self._layout.row_shards

    def prepare(self, length: int, until: int) -> None:
        """See `SequenceEngine`; every process compiles at its own pace."""
        super().prepare(length, until)
        wait_for_all()

    def rest(self) -> None:
        """See `SequenceEngine`."""
        super().rest()
        self.stats.add_devices()
        self.stats.exchange = self._exchanged.added_to(self.stats.exchange)

    def gather(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """See `SequenceEngine`."""
        return self._mesh_programs.gather(arrays)

    def _run_chunk(self, width, parts, ends):  # type: ignore[no-untyped-def]
        """As many passes as it takes for every device to have a lane for each of its prompts."""
        turns = self._mesh_rows.turns(parts, self._pass_lanes(width))
        most = 1 if self.recorder is not None else min(len(turns), self._mesh_programs.passes(width))
        return self._company.run((self._chunk(width, turn, ends) for turn in turns), most)[-1]

    def _pass_lanes(self, width: int) -> int:
        return self._mesh_programs.lanes(width) * self._layout.row_shards

    def _runs(self, width, span):  # type: ignore[no-untyped-def]
        programs = super()._runs(width, span)
        return self._company.programs(programs, width, span) if self._company.keeps else programs

    def _run_alone(self, width: int, row: int, start: int) -> np.ndarray:
        x = self._run_chunk(width, [(row, start)], {})
        return self._whole(x)[self._mesh_rows.lane(row, self._pass_lanes(width))]

    def _serve(self, deferred, index: int, carried):  # type: ignore[no-untyped-def]
        routed, arrived = carried
        fleet = self.fleet
        if fleet.cannot_miss(index):
            deferred.append((index, self.lookout.last))
            return routed, arrived, self._serves[index], fleet.pools(), fleet.slot_rows(index)
        try:
            report = self.lookout.read(self.lookout.last, self.plan.rows)
        except RuntimeError as error:
            raise LinkError(f"what led to layer {index} has failed: {str(error).splitlines()[0]:.200}") from error
        self._exchanged.hear(index, self.lookout.last)
        self._note(COMPUTE, f"layer {index}", self._served_at)
        slot_rows = fleet.serve(index, self._by_age(report.ids), self._by_age(self._parts), report.bins)
        return routed, arrived, self._serves[index], fleet.pools(), slot_rows

    def _serve_prompt(self, width, absorb, index: int, carried):  # type: ignore[no-untyped-def]
        routed, rows, outputs = carried
        self._company.finish()  # while the host reads; its slots may be taken then
        devices = [self._layout.devices[member.number] for member in self.fleet.members]
        own = [local_parts(array, devices) for array in jax.tree.leaves((rows, outputs))]
        parts = list(zip(*own, strict=True))
        held = [SortedRows._make(part[:-1]) for part in parts]
        done = [part[-1] for part in parts]
        counts = [np.asarray(part.sizes) for part in held]
        self._note(COMPUTE, f"prompt, layer {index}", self._served_at)

        def run(member: int, pool: Any, slot_row: np.ndarray) -> None:
            began = time.perf_counter()
            wave = self._mesh_programs.wave_of(width, self.fleet.members[member].number)
            done[member] = wave(held[member], done[member], pool, slot_row)
            self._note(COMPUTE, f"prompt, wave of layer {index}", began)

        keeps = self._company.keeps
        slot_rows = self.fleet.serve_prompt(index, counts, run, keeps_last=keeps)
        outputs = jax.make_array_from_single_device_arrays(outputs.shape, self._layout.each, done)
        if keeps:
            outputs = self._company.keep(LastWave(width, rows, outputs, slot_rows))
        return routed, self._serves[index], rows.order, outputs

    def _advance(self, rows, then):  # type: ignore[no-untyped-def]
        self._parts = [self._mesh_rows.part(row) for row in sorted(rows)]
        return super()._advance(rows, then)

    def _note_routes(self, layer: int, ids: Any) -> None:
        report = self.lookout.read(ids, self.plan.rows)
        self._exchanged.hear(layer, ids)
        self.fleet.note(layer, self._by_age(report.ids), self._by_age(self._parts))

    def _read_choice(self, tokens: Any, told: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(told[0]), np.asarray(told[1])

    def _whole(self, array: jax.Array) -> np.ndarray:
        return self._mesh_programs.whole(array)

    def _recover_slots(self) -> bool:
        return self.fleet.restore()

    def _note_peak(self) -> None:
        live = max(live_bytes(self._layout.devices[member.number]) for member in self.fleet.members)
        self.stats.peak_device_bytes = max(self.stats.peak_device_bytes, live + self.lookout.programs.temp_bytes)
