"""The memory plan: every device byte accounted for before anything is allocated."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

from ef_jax.errors import BudgetError, InputError
from ef_jax.memory.device_share import DeviceShare
from ef_jax.memory.host_plan import HostPlan, make_host_plan
from ef_jax.memory.sizes import format_bytes
from ef_jax.nn import cache_shapes
from ef_jax.spec import ModelSpec

STAGING_SLOTS = 16
_RESERVE_SHARE = 0.02
_HOST_POOL_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_HOST_POOL_DEFAULT_GB = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRequest:
    """What the caller asks of device memory: a budget in bytes or a fraction of the experts, sequences and context.

    `device_memory` and `expert_fraction` exclude one another. `expert_fraction` counts cache slots: 1.0 keeps every
    expert on the device, 0.0 keeps none between steps. `batch` is sequences of one step, `rows` sequences that are held
    at once, each with keys and values of its own (None: as many as a step runs). `context` is tokens a sequence (prompt
    and output), `chunk` tokens a sequence that one prefill pass takes. `host_memory` are bytes of host memory for
    expert blocks, the others stay on disk; None: all are in host memory.

    On a mesh the budget is each device's, `expert_fraction` is of the experts that a device holds, `batch` and `rows`
    are in all, and `host_memory` is each process's.
    """

    device_memory: int | None = None
    expert_fraction: float | None = None
    host_memory: int | None = None
    batch: int = 1
    rows: int | None = None
    context: int = 1024
    chunk: int = 256

    def __post_init__(self) -> None:
        if (self.device_memory is None) == (self.expert_fraction is None):
            raise InputError("give either device_memory or expert_fraction, not both and not neither")
        if self.device_memory is not None and self.device_memory < 1:
            raise InputError(f"device_memory must be positive, got {self.device_memory}")
        fraction = self.expert_fraction
        if fraction is not None and not 0.0 <= fraction <= 1.0:
            raise InputError(f"expert_fraction must be between 0 and 1, got {fraction}")
        if not 1 <= self.batch <= 1024:
            raise InputError(f"batch must be between 1 and 1024, got {self.batch}")
        if self.rows is not None and not self.batch <= self.rows <= 4096:
            raise InputError(f"sequences must be between batch, {self.batch}, and 4096, got {self.rows}")
        if not self.context >= 2:
            raise InputError(f"context must be at least 2 tokens, got {self.context}")
        if not self.chunk >= 1:
            raise InputError(f"chunk must be positive, got {self.chunk}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Device bytes by item, their sum, and what they buy.

    `workspace` is measured: temporaries and fresh outputs of the largest compiled program. `reserve` is slack for the
    allocator. `block_dtype` is what the experts' weights are stored as. `budget` is what was asked for, or the sum
    where a fraction of the experts was asked for. `left_out` are cache slots that it would have, did the kernels
    read a pool of that size. `host_bytes` are those of expert blocks in host memory: of all of them, or, where `host`
    says how many it holds, of these and of what is on its way. `light_misses` and `host_light_misses` are what blocks
    of 4 bits, for misses of little weight, take on the device and on the host.

    With a `share` it is the plan of one device of a mesh: `experts` are those that it holds, `batch` and `rows` are in
    all, and `host_bytes` and `disk_bytes` are of all devices of this process.
    """

    dense: int
    kv_cache: int
    cache_slots: int
    staging: int
    transfers: int
    look_ahead: int
    state: int
    workspace: int
    reserve: int
    budget: int
    slots: int
    staging_slots: int
    experts: int
    token_cycle: int
    block_bytes: int
    batch: int
    rows: int
    context: int
    chunk: int
    host_bytes: int
    block_dtype: str
    left_out: int = 0
    light_misses: int = 0
    host_light_misses: int = 0
    host: HostPlan | None = None
    share: DeviceShare | None = None

    @property
    def items(self) -> dict[str, int]:
        """Device bytes by item."""
        names = (
            "dense", "kv_cache", "cache_slots", "staging", "transfers", "look_ahead", "state", "workspace", "reserve"
        )  # fmt: skip
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "light_misses": self.light_misses} if self.light_misses else sizes

    @property
    def total(self) -> int:
        """Sum of the items; never more than `budget`."""
        return sum(self.items.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the expert blocks for which there is no place in host memory."""
        if self.host is None:
            return 0
        devices = 1 if self.share is None else self.share.local_devices
        return devices * (self.experts - self.host.places) * self.block_bytes

    @property
    def rows_here(self) -> int:
        """Of the sequences that are held at once, those on this device."""
        return self.rows if self.share is None else self.share.rows(self.rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will be slow about this plan, in words."""
        found = []
        if self.slots < min(self.token_cycle, self.experts):
            found.append(
                f"{self.slots} cache slots are fewer than the {self.token_cycle} experts that one step touches: "
                "most of them will cross the link at every step"
            )
        if self.left_out:
            found.append(
                f"{self.left_out} more cache slots are not used: the kernels cannot read a pool of that size, "
                "but can read one that is larger still"
            )
        if self.share is not None and self.share.estimated:
            found.append(
                f"the workspace is an estimate, one device's programs and room for the exchange: the mesh's own need "
                f"its {self.share.devices} devices"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types: every field, `total` and `warnings`."""
        sums = {"total": self.total, "disk_bytes": self.disk_bytes}
        return {**dataclasses.asdict(self), **sums, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        share, here = self.share, self.rows_here
        whole = "" if share is None or not share.whole else f"; whole on each device: {', '.join(share.whole)}"
        in_all = "" if share is None else f", of {self.rows} in all"
        notes = {
            "dense": f"attention, norms, routers, embeddings{whole}",
            "kv_cache": f"{here} sequence{'s' * (here > 1)} x {self.context} tokens{in_all}",
            "cache_slots": f"{self.slots} of {self.experts} expert blocks of {format_bytes(self.block_bytes)}, "
            f"{self.block_dtype}",
            "staging": f"{self.staging_slots} blocks that pass through",
            "transfers": "blocks in flight",
            "look_ahead": "routers of coming layers, trained predictor",
            "state": "sampling",
            "light_misses": "blocks of 4 bits, for misses of little weight",
            "workspace": f"largest program, prompt chunks of {self.chunk} tokens",
            "reserve": "allocator slack",
        }
        where = "the device"
        if share is not None:
            where = f"each of {share.devices} devices ({share.mesh}, experts placed {share.placement})"
        lines = [f"memory plan: {format_bytes(self.total)} of {format_bytes(self.budget)} on {where}"]
        lines += [f"  {name:12} {format_bytes(size):>9}  {notes[name]}" for name, size in self.items.items()]
        held = f"all {self.experts} expert blocks"
        if self.host is not None:
            held = f"{self.host.places} of {self.experts} expert blocks, and {self.host.on_their_way} on their way"
        if share is not None:
            each = "" if self.host is None else f", {held} on each"
            held = f"{share.host_blocks} expert blocks, of {share.local_devices} devices of this process{each}"
        lines.append(f"  {'host':12} {format_bytes(self.host_bytes):>9}  pinned, {held}")
        if self.disk_bytes:
            lines.append(f"  {'disk':12} {format_bytes(self.disk_bytes):>9}  read when they are needed, or before")
        if self.host_light_misses:
            lines.append(f"  {'':12} {format_bytes(self.host_light_misses):>9}  pinned, the same in 4 bits")
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FixedBytes:
    """Device bytes that do not depend on the number of slots.

    Blocks in flight take `max(transfer_blocks, transfer_rings x staging slots)` blocks; or, if that is more, those that
    a layer of a step asks for and `prefetch_blocks`, since prompts are served with no prefetch under way. Where experts
    can miss at all, `light_misses` and `host_light_misses` are what those in low precision take on device and host.
    """

    dense: int
    kv_cache: int
    look_ahead: int
    state: int
    workspace: int
    transfer_blocks: int
    transfer_rings: int
    prefetch_blocks: int = 0
    light_misses: int = 0
    host_light_misses: int = 0


def kv_cache_bytes(spec: ModelSpec, rows: int, context: int) -> int:
    """Bytes of what the layers remember, keys and values mostly, of `rows` sequences of `context` tokens."""
    shapes = (shape for layer in spec.layers for shape in cache_shapes(spec, layer.kind, rows, context))
    return sum(shape.size * shape.dtype.itemsize for shape in shapes)


def experts_a_step(spec: ModelSpec, batch: int, share: DeviceShare | None = None) -> int:
    """The most experts that one layer of one decode step can need of a device, which must have slots at the same
    time."""
    if share is not None:
        return share.experts_a_step(spec, batch)
    return min(spec.experts.count, batch * spec.experts.top_k)


def make_plan(
    spec: ModelSpec,
    request: MemoryRequest,
    fixed: FixedBytes,
    *,
    readable: Callable[[int], bool] = lambda slots: True,
    share: DeviceShare | None = None,
) -> MemoryPlan:
    """Share a budget out: fixed items first, the staging ring, then as many cache slots as fit.

    Args:
      spec: the model.
      request: what is asked for.
      fixed: what does not depend on the slots.
      readable: whether kernels can read a pool of so many slots; of some sizes they may not, small ones they can.
      share: what the device has of a mesh; None: all.

    Raises:
      BudgetError: the budget holds less than the fixed items and the smallest staging ring (the experts that one
        layer of one step can need); the message gives the smallest budget that works.
    """
    least_staging = experts_a_step(spec, request.batch, share)
    token_cycle = len(spec.step_moe_layers) * least_staging
    in_layer = spec.experts.count if share is None else share.most_in_layer
    held = spec.total_experts if share is None else share.held
    full_staging = min(in_layer, max(least_staging, STAGING_SLOTS))
    block = spec.block_bytes

    def plan(slots: int, staging_slots: int, budget: int | None, left_out: int = 0) -> MemoryPlan:
        blocks = max(fixed.transfer_blocks, fixed.transfer_rings * staging_slots)
        if staging_slots and fixed.prefetch_blocks:
            blocks = max(blocks, least_staging + fixed.prefetch_blocks)
        sizes = {
            "dense": fixed.dense,
            "kv_cache": fixed.kv_cache,
            "cache_slots": slots * block,
            "staging": staging_slots * block,
            "transfers": blocks * block,
            "look_ahead": fixed.look_ahead,
            "state": fixed.state,
            "workspace": fixed.workspace,
        }
        misses = slots < held
        if misses:
            sizes["light_misses"] = fixed.light_misses
        reserve = math.ceil(_RESERVE_SHARE * sum(sizes.values()))
        host, host_bytes = None, block * (held if share is None else share.host_blocks)
        if request.host_memory is not None:
            host = make_host_plan(
                spec, request.host_memory, step=least_staging, staging_slots=staging_slots, share=share
            )
        if host is not None:
            host_bytes = host.nbytes * (1 if share is None else share.local_devices)
        return MemoryPlan(
            **sizes,
            reserve=reserve,
            budget=sum(sizes.values()) + reserve if budget is None else budget,
            slots=slots,
            staging_slots=staging_slots,
            experts=held,
            token_cycle=token_cycle,
            block_bytes=block,
            batch=request.batch,
            rows=request.rows or request.batch,
            context=request.context,
            chunk=request.chunk,
            host_bytes=host_bytes,
            host=host,
            share=share,
            block_dtype=spec.block_dtype,
            left_out=left_out,
            host_light_misses=fixed.host_light_misses if misses else 0,
        )

    def readable_plan(slots: int, staging_slots: int, budget: int | None) -> MemoryPlan:
        fewer = next((fewer for fewer in range(slots, 0, -1) if readable(fewer + staging_slots)), 0)
        return plan(fewer, staging_slots, budget, slots - fewer)

    resident = readable(held)
    if request.expert_fraction is not None:
        slots = round(request.expert_fraction * held)
        if resident and slots == held:
            return plan(slots, 0, None)
        return readable_plan(slots, full_staging, None)

    budget = request.device_memory
    assert budget is not None
    if resident and plan(held, 0, budget).total <= budget:
        return plan(held, 0, budget)
    least = plan(0, least_staging, budget).total
    if least > budget:
        if resident:  # a step may need all of them
            least = min(least, plan(held, 0, budget).total)
        raise BudgetError(
            f"a device budget of {format_bytes(budget)} is too small: this model needs at least {least} bytes "
            f"({_round_up(least)}) at batch {request.batch}, context {request.context}, chunk {request.chunk}"
        )
    staging_slots = full_staging if plan(0, full_staging, budget).total <= 0.9 * budget else least_staging
    base = plan(0, staging_slots, budget)
    slots = int((budget - base.total) / (block * (1 + _RESERVE_SHARE)))
    while slots and plan(slots, staging_slots, budget).total > budget:
        slots -= 1
    return readable_plan(min(slots, held), staging_slots, budget)


def check_host_pool(host_bytes: int, platform: str) -> None:
    """Refuse a model whose experts, so many bytes of them, do not fit in the runtime's pinned host pool.

    Raises:
      BudgetError: on a GPU, with the variable to set; the CPU backend has no such pool.
    """
    if platform == "cpu":
        return
    limit = int(os.environ.get(_HOST_POOL_VARIABLE, _HOST_POOL_DEFAULT_GB)) * 2**30
    need = 1.1 * host_bytes
    if need > limit:
        raise BudgetError(
            f"the experts need {need / 2**30:.0f} GiB of pinned host memory and the limit is {limit / 2**30:.0f}: "
            f"set {_HOST_POOL_VARIABLE}={math.ceil(need / 2**30)} before starting Python"
        )


def _round_up(count: int) -> str:
    return f"{math.ceil(count / 10**6)}MB"
