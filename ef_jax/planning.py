"""From options to a memory plan: the request that they make, and the plan that the model's programs leave room for."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from ef_jax.errors import BudgetError, InputError
from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.device_share import DeviceShare
from ef_jax.memory.host_plan import make_host_plan
from ef_jax.memory.plan import (
    FixedBytes,
    MemoryPlan,
    MemoryRequest,
    experts_a_step,
    kv_cache_bytes,
    make_plan,
)
from ef_jax.memory.sizes import parse_bytes
from ef_jax.mesh.mesh_spec import MeshSpec, check_divides_rows
from ef_jax.nn import dense_shapes
from ef_jax.nn.routing_path import RoutingPathSpec
from ef_jax.runtime.expert_kernels import ExpertKernels, choose_kernels
from ef_jax.runtime.look_ahead import LookAheadSpec, look_ahead_bytes
from ef_jax.runtime.low_precision import LowPrecision
from ef_jax.runtime.programs import Programs
from ef_jax.runtime.routing_paths import routing_path_bytes
from ef_jax.schedule.async_link import blocks_ahead
from ef_jax.schedule.device_link import blocks_in_flight, resolve_copy_mode
from ef_jax.spec import ModelSpec

_DEFAULT_CONTEXT = 4096
_DEFAULT_FRACTION = 0.5
_DEFAULT_DEVICE_SHARE = 0.9


def make_request(
    spec: ModelSpec,
    device: jax.Device,
    *,
    device_memory: str | int | None = None,
    expert_fraction: float | None = None,
    host_memory: str | int | None = None,
    batch: int = 1,
    sequences: int | None = None,
    context: int | None = None,
    chunk: int = 256,
    mesh: MeshSpec | None = None,
) -> MemoryRequest:
    """The request that `load`'s options make for this model and device, or for each of a mesh, defaults filled in.

    Raises:
      InputError: an option is out of range, the mesh does not divide the sequences, or the budget is larger than the
        device's memory.
    """
    if mesh is not None:
        check_divides_rows(mesh, batch)
        check_divides_rows(mesh, batch if sequences is None else sequences, "sequences")
    if context is not None and context > spec.max_position:
        raise InputError(f"context {context} is longer than the model's {spec.max_position} positions")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    budget = None if device_memory is None else parse_bytes(device_memory)
    if budget is not None and limit is not None and budget > limit:
        raise InputError(f"device_memory {device_memory} is more than the {limit} bytes that {device} offers")
    if budget is None and expert_fraction is None:
        if limit is not None:
            budget = int(_DEFAULT_DEVICE_SHARE * limit)
        else:
            expert_fraction = _DEFAULT_FRACTION
    context = min(spec.max_position, _DEFAULT_CONTEXT) if context is None else context
    return MemoryRequest(
        device_memory=budget,
        expert_fraction=expert_fraction,
        host_memory=None if host_memory is None else parse_bytes(host_memory),
        batch=batch,
        rows=sequences,
        context=context,
        chunk=context if spec.encodes else chunk,
    )


def plan_model(
    spec: ModelSpec,
    request: MemoryRequest,
    device: jax.Device,
    copy_mode: str | None = None,
    *,
    kernels: ExpertKernels | None = None,
    look_ahead: LookAheadSpec | None = None,
    routing_path: RoutingPathSpec | None = None,
    prefetches: bool = False,
    lossy: LossyOptions = LOSSLESS,
    share: DeviceShare | None = None,
    make_programs: Callable[[int], Programs] | None = None,
    exchange_bytes: int = 0,
) -> tuple[MemoryPlan, Programs]:
    """The memory plan, and the programs that it was measured on; allocates nothing but the executables.

    Args:
      spec: the model, as the device has it.
      request: what is asked for.
      device: which, or one like it.
      copy_mode: how blocks cross the link; None: the device's default.
      kernels: what computes the experts; None: the best.
      look_ahead: what programs of a step look ahead by.
      routing_path: a predictor that has memory of its own.
      prefetches: blocks are fetched before they are asked for.
      lossy: options that change results.
      share: what the device has of a mesh; None: all.
      make_programs: gives the programs over a pool of so many slots, which a mesh has to; None: those of one device.
      exchange_bytes: workspace beside that of the programs.

    Raises:
      BudgetError: the budget is too small.
    """
    mode = resolve_copy_mode(copy_mode, device)
    transfer_blocks, transfer_rings = blocks_in_flight(mode, device)
    rows = request.rows or request.batch
    if share is not None:
        rows = share.rows(rows)
    predicting = look_ahead_bytes(spec, look_ahead, rows)
    if routing_path is not None:
        predicting += routing_path_bytes(routing_path, rows=rows, context=request.context)

    if request.host_memory is not None:  # too little of it is said before anything is compiled
        step = experts_a_step(spec, request.batch, share)
        make_host_plan(spec, request.host_memory, step=step, staging_slots=0, share=share)
    kernels = kernels or choose_kernels(spec, device)
    low, low_bytes = None, 0
    if lossy.low_precision_miss is not None:
        low = LowPrecision.of(spec, kernels, batch=request.batch, device=device)
        low_bytes = low.slots * low.spec.block_bytes * (2 if transfer_blocks else 1)

    def fixed(workspace: int) -> FixedBytes:
        return FixedBytes(
            dense=sum(shape.size * shape.dtype.itemsize for shape in dense_shapes(spec).values()),
            look_ahead=predicting,
            kv_cache=kv_cache_bytes(spec, rows, request.context),
            state=rows * (spec.vocab + 64),
            workspace=workspace + exchange_bytes,
            transfer_blocks=transfer_blocks,
            transfer_rings=transfer_rings,
            prefetch_blocks=blocks_ahead(spec.block_bytes) if prefetches and mode == "async" else 0,
            light_misses=low_bytes,
            host_light_misses=0 if low is None else low.host_bytes,
        )

    plan_for = functools.partial(make_plan, spec, request, readable=functools.partial(kernels.take, spec), share=share)

    # Compiled for the slots of a plan without workspace, then for those that the measured workspace leaves. A budget
    # too small for the first is too small, but the least that works is known only after measuring.
    try:
        first = plan_for(fixed(0))
        pool_slots = first.slots + first.staging_slots
    except BudgetError:
        pool_slots = experts_a_step(spec, request.batch, share)
    make_programs = make_programs or functools.partial(
        _programs, spec, batch=request.batch, rows=rows, context=request.context, chunk=request.chunk, device=device,
        kernels=kernels, look_ahead=look_ahead, low_precision=low, lossy=lossy,
    )  # fmt: skip
    programs = make_programs(pool_slots)
    while True:
        programs.compile_largest()
        plan = plan_for(fixed(programs.workspace_bytes))
        if plan.slots + plan.staging_slots == programs.pool_slots:
            return plan, programs
        programs = programs.with_pool_slots(plan.slots + plan.staging_slots)


def _programs(spec: ModelSpec, pool_slots: int, *, device: jax.Device, **sizes: Any) -> Programs:
    return Programs(spec, pool_slots=pool_slots, sharding=jax.sharding.SingleDeviceSharding(device), **sizes)
