"""From a checkpoint and a layout to a running model on several devices."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ef_jax.errors import InputError, UnsupportedError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.host_store import HostStore
from ef_jax.memory.plan import MemoryPlan, MemoryRequest, check_host_pool
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.mesh.engine import MeshEngine
from ef_jax.mesh.exchange import Transport
from ef_jax.mesh.fleet import Fleet, Member
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.overlap_option import OverlapOption
from ef_jax.mesh.planning import plan_on_mesh
from ef_jax.mesh.processes import same_everywhere, wait_for_all
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.share import held_keys
from ef_jax.mesh.tensor import DenseShares, place_dense
from ef_jax.paging import check_host_memory
from ef_jax.placement import Placement
from ef_jax.predict import Predictor
from ef_jax.prefetching import ALL_RESIDENT, Prefetching
from ef_jax.progress import Progress
from ef_jax.runtime.dense import DenseWeights
from ef_jax.runtime.expert_kernels import ExpertKernels
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.runtime.look_ahead import LookAhead, LookAheadSpec
from ef_jax.schedule.async_link import AsyncLink
from ef_jax.schedule.device_link import CopyMode, DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.fill import fill
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.scheduler import Scheduler
from ef_jax.spec import ModelSpec
from ef_jax.stats import Stats
from ef_jax.text import Tokenizer
from ef_jax.weights import Checkpoint

_LOG = logging.getLogger("ef_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshRun:
    """What `load`'s options come to on a mesh, checked.

    Attributes:
      layout: the devices.
      placement: of the experts on the owners of a group; `placed` is what it was asked for by.
      transport: how rows are exchanged.
      overlap: whether passes of prompts run side by side.
      request: of each device's memory; sequences are those of all.
      kernels, settled, look, policy, candidates, most_wasted, lossy: as on one device.
      mode, emulated: how blocks cross each device's link.
      predictor: makes one for a device; None where nothing is predicted.
    """

    layout: MeshLayout
    placement: Placement
    placed: str
    transport: Transport
    overlap: OverlapOption
    request: MemoryRequest
    kernels: ExpertKernels
    settled: Prefetching
    look: LookAheadSpec | None
    policy: str
    candidates: str
    most_wasted: float
    lossy: LossyOptions
    mode: CopyMode
    emulated: LinkModel | None
    predictor: Callable[[], Predictor | None]


def check_options(spec: ModelSpec, settled: Prefetching, lossy: LossyOptions, **options: Any) -> None:
    """Refuse what a mesh does not have.

    Args:
      spec: the model.
      settled: options on prefetching.
      lossy: lossy options.
      **options: of `load`, by name, that must be left out: None or their default where they are.

    Raises:
      InputError: one of them is given.
      UnsupportedError: the model has an encoder.
    """
    if spec.encodes:
        raise UnsupportedError(f"{spec.family} has an encoder, which runs on one device only: leave mesh out")
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}={value!r:.60} is of runs on one device: leave it or the mesh out")
    for name in ("cache_bias", "skip", "low_precision_miss"):
        if getattr(lossy, name) is not None:
            raise InputError(f"lossy_{name} is of runs on one device: leave it or the mesh out")
    if settled.trained is not None or settled.routing_path is not None:
        raise InputError("trained predictors are of runs on one device: give pregate, history or none with a mesh")


def _check_same(spec: ModelSpec, run: MeshRun) -> None:
    """Refuse processes that were given different models or options, any of which could leave them waiting."""
    chosen = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    own = ("layout", "placement", "kernels", "predictor")
    layout = run.layout
    same_everywhere(
        {
            "the model": repr(spec),
            "mesh": f"data={layout.data},expert={layout.expert},tensor={layout.tensor}",
            "placement": run.placement.serves.tobytes(),
            "kernels": repr(run.kernels.as_dict()),
            **{name: repr(value) for name, value in chosen.items() if name not in own},
        }
    )


def load_on_mesh(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    run: MeshRun,
    tokenizer: Tokenizer | None,
    *,
    progress: bool | None,
    on_plan: Callable[[MemoryPlan], None] | None,
) -> LanguageModel:
    """Load a model on a mesh: on every process, at the same time.

    Raises:
      InputError: as `ef_jax.load`, or processes were given different models or options.
    """
    _check_same(spec, run)
    layout, request, settled, look = run.layout, run.request, run.settled, run.look
    plan, programs = plan_on_mesh(
        spec,
        request,
        layout,
        run.placement,
        run.transport,
        run.mode,
        placed=run.placed,
        overlap=run.overlap,
        kernels=run.kernels,
        look_ahead=look,
        prefetches=settled.prefetch != "off",
        lossy=run.lossy,
    )
    here, own = layout.devices[layout.local[0]], DenseShares(spec, layout.tensor).spec
    check_host_pool(plan.host_bytes, here.platform)
    check_host_memory(plan, here)
    _LOG.info("%s", plan)
    if on_plan is not None:
        on_plan(plan)
    threads = min(8, max(2, os.cpu_count() or 1))
    with Progress(plan.dense + plan.host_bytes, "B", "loading", enabled=progress) as bar:
        dense = DenseWeights(own, place_dense(checkpoint, layout, advance=bar.update))
        stores = [
            HostStore.load(
                checkpoint,
                layout.devices[number],
                keys=held_keys(run.placement, layout.owner(number)),
                advance=bar.update,
                threads=threads,
            )
            for number in layout.local
        ]
    resident = plan.slots == plan.experts
    if resident:
        blind = programs.without_look_ahead()
        assert isinstance(blind, MeshPrograms)
        settled, look, programs = ALL_RESIDENT, None, blind
    members = [
        _member(spec, run, plan, settled, number, store) for number, store in zip(layout.local, stores, strict=True)
    ]
    predicts = settled.predictor != "none" and not resident
    wait_for_all()  # each compiled and read at its own pace
    engine = MeshEngine(
        own,
        plan,
        programs,
        dense,
        Fleet(layout, run.placement, members, predicts=predicts),
        run.placement,
        look_ahead=None if look is None else LookAhead(own, look, dense, rows=plan.rows, sharding=layout.everywhere),
        prefetching=settled,
        lossy=run.lossy,
    )
    return LanguageModel(Path(checkpoint.path), spec, engine, tokenizer)


def _member(
    spec: ModelSpec, run: MeshRun, plan: MemoryPlan, settled: Prefetching, number: int, store: HostStore
) -> Member:
    """What serves one device's experts."""
    device = run.layout.devices[number]
    holds = run.placement.holds[..., run.layout.owner(number)]
    shape = {"layers": len(spec.moe_layers), "experts": spec.experts.count}
    slots = plan.slots + plan.staging_slots
    device_link: DeviceLink
    if run.mode == "async" and run.emulated is None:
        device_link = AsyncLink(spec, store, device, slots=slots)
    else:
        device_link = DeviceLink(spec, store, device, slots=slots, mode=run.mode)
    residency = Residency(
        **shape,
        cache_slots=plan.slots,
        staging_slots=plan.staging_slots,
        policy=make_policy(run.policy, **shape, cache_slots=plan.slots),
    )
    if plan.slots == plan.experts:
        fill(residency, device_link, [np.flatnonzero(of_layer).tolist() for of_layer in holds])
    link = device_link if run.emulated is None else EmulatedLink(device_link, run.emulated)
    stats = Stats.empty(
        layers=shape["layers"], experts=int(holds.sum()), slots=plan.slots, staging_slots=plan.staging_slots
    )
    scheduler: Scheduler[Any] = Scheduler(
        residency,
        link,
        stats,
        block_bytes=plan.block_bytes,
        wave_size=MAX_INSERT,
        predictor=run.predictor() if settled.predictor != "none" else None,
        prefetch=settled.prefetch,
        candidates=run.candidates,
        most_wasted=run.most_wasted,
        trial=False,
    )
    return Member(number=number, holds=holds, residency=residency, link=link, scheduler=scheduler, stats=stats)
