"""The memory plan of a mesh's devices: measured on its own programs, or estimated where its devices are elsewhere."""

import dataclasses
import functools
from typing import Any

import jax

from ef_jax.errors import BudgetError
from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.plan import MemoryPlan, MemoryRequest
from ef_jax.memory.slot_pool import MAX_INSERT
from ef_jax.mesh.exchange import Transport
from ef_jax.mesh.layout import MeshLayout
from ef_jax.mesh.mesh_spec import MeshSpec, check_divides_rows
from ef_jax.mesh.overlap_option import ALONE, Overlap, OverlapOption
from ef_jax.mesh.pass_costs import measured_overlap
from ef_jax.mesh.programs import MeshPrograms
from ef_jax.mesh.share import device_share, exchange_bytes
from ef_jax.mesh.tensor import DenseShares
from ef_jax.placement import Placement
from ef_jax.planning import plan_model
from ef_jax.runtime import pass_shapes
from ef_jax.runtime.expert_kernels import ExpertKernels
from ef_jax.runtime.look_ahead import LookAheadSpec
from ef_jax.runtime.programs import Programs
from ef_jax.spec import ModelSpec


def plan_on_mesh(
    spec: ModelSpec,
    request: MemoryRequest,
    layout: MeshLayout,
    placement: Placement,
    transport: Transport,
    copy_mode: str | None,
    *,
    placed: str = "contiguous",
    overlap: OverlapOption = "off",
    kernels: ExpertKernels,
    look_ahead: LookAheadSpec | None = None,
    prefetches: bool = False,
    lossy: LossyOptions = LOSSLESS,
) -> tuple[MemoryPlan, MeshPrograms]:
    """The plan of every device, which is that of the one with the most experts, and the programs it was measured on.

    Args:
      spec: the whole model.
      request: what is asked for of each device.
      layout: the devices.
      placement: of the experts on the owners of a group.
      transport: how rows are exchanged.
      copy_mode: how blocks cross each link; None: the devices' default.
      placed: what to call the placement.
      overlap: passes of prompts run side by side; "auto": where measurements on zeros, made now, predict a gain.
      kernels: what computes the experts.
      look_ahead: what programs of a step look ahead by.
      prefetches: blocks are fetched before they are asked for.
      lossy: options that change results.

    Raises:
      BudgetError: the budget is too small.
      InputError: the mesh does not divide the sequences or the model.
    """
    mesh = MeshSpec(data=layout.data, expert=layout.expert, tensor=layout.tensor)
    check_divides_rows(mesh, request.batch)
    share = device_share(mesh, placement, spec, placed=placed, local=layout.local)
    shares = DenseShares(spec, mesh.tensor)
    sizes: dict[str, Any] = {"batch": share.rows(request.batch), "context": request.context, "chunk": request.chunk}
    chosen: dict[str, Any] = {"kernels": kernels, "look_ahead": look_ahead, "lossy": lossy}

    make_programs = functools.partial(MeshPrograms, shares, layout=layout, transport=transport, **sizes, **chosen)

    def planned(decided: Overlap) -> tuple[MemoryPlan, MeshPrograms]:
        plan, programs = plan_model(
            shares.spec,
            request,
            layout.devices[layout.local[0]],
            copy_mode,
            prefetches=prefetches,
            share=share,
            make_programs=lambda pool_slots: make_programs(overlap=decided, pool_slots=pool_slots),
            **chosen,
        )
        assert isinstance(programs, MeshPrograms)
        return plan, programs

    first = make_programs(pool_slots=1)
    if not any(first.company(width) for width in first.chunk_widths):
        return planned(ALONE)
    if overlap != "auto":
        return planned(Overlap(passes=2 if overlap == "on" else 1, reason="asked for"))
    plan, programs = planned(ALONE)
    last_wave = None if plan.slots == plan.experts else plan.staging_slots or MAX_INSERT
    decided = measured_overlap(programs, placement, last_wave=last_wave)
    try:
        return planned(decided)
    except BudgetError:
        return planned(dataclasses.replace(decided, passes=1, reason="there is no memory for two passes"))


def estimate_on_mesh(
    spec: ModelSpec,
    request: MemoryRequest,
    mesh: MeshSpec,
    placement: Placement,
    device: jax.Device,
    copy_mode: str | None,
    *,
    placed: str = "contiguous",
    kernels: ExpertKernels,
    lossy: LossyOptions = LOSSLESS,
) -> MemoryPlan:
    """The same where only `device`, one like the mesh's, is at hand: with the workspace of one device's programs, for
    its share of the sequences, and room for the exchange.

    Raises:
      BudgetError: the budget is too small.
      InputError: the mesh does not divide the sequences or the model.
    """
    check_divides_rows(mesh, request.batch)
    share = device_share(mesh, placement, spec, placed=placed, estimated=True)
    own = DenseShares(spec, mesh.tensor).spec
    alone = dataclasses.replace(own, tensor_shares=1)  # nothing to add up with other devices
    batch = share.rows(request.batch)
    widths = (1, *pass_shapes.chunk_widths(min(request.chunk, request.context)))
    tokens = max(pass_shapes.lanes(width, batch) * width for width in widths)

    def make_programs(pool_slots: int) -> Programs:
        return Programs(
            alone,
            batch=batch,
            context=request.context,
            chunk=request.chunk,
            pool_slots=pool_slots,
            sharding=jax.sharding.SingleDeviceSharding(device),
            kernels=kernels,
            lossy=lossy,
        )

    return plan_model(
        own,
        request,
        device,
        copy_mode,
        kernels=kernels,
        lossy=lossy,
        share=share,
        make_programs=make_programs,
        exchange_bytes=exchange_bytes(mesh, spec, tokens),
    )[0]
