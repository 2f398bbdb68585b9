"""What `load`'s option on host memory comes to: a host pool, what fills it from disk, and what cannot go with it."""

import jax

from ef_jax.errors import UnsupportedError
from ef_jax.lossy import LossyOptions
from ef_jax.memory.host_plan import check_available
from ef_jax.memory.plan import MemoryPlan
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.schedule.disk_link import DiskLink
from ef_jax.schedule.host_tier import HostTier
from ef_jax.spec import ModelSpec
from ef_jax.weights import Checkpoint
from ef_jax.weights.block_reader import BlockReader, Checksums


def check_paging(lossy: LossyOptions, *, quantizes: bool) -> None:
    """Refuse what cannot be done with blocks that are read again and again.

    Args:
      lossy: the run's options.
      quantizes: blocks are rounded while they are read.

    Raises:
      UnsupportedError: blocks are rounded, or have a second copy in host memory.
    """
    if quantizes:
        raise UnsupportedError(
            f"host_memory reads experts again and again, and lossy_quantize {lossy.quantize} would round them each "
            "time: convert the checkpoint with ef-convert --quantize, and leave lossy_quantize out"
        )
    if lossy.low_precision_miss is not None:
        raise UnsupportedError(
            "lossy_low_precision_miss keeps every expert in 4 bits in host memory, which host_memory is to bound: give "
            "one of the two"
        )


def check_host_memory(plan: MemoryPlan, device: jax.Device) -> None:
    """Refuse a plan for which the machine has too little memory; on a CPU the device's memory is part of it.

    Raises:
      BudgetError: it has.
    """
    devices = 1 if plan.share is None else plan.share.local_devices
    on_device = plan.total * devices if device.platform == "cpu" else 0
    nbytes = plan.host_bytes + plan.host_light_misses + on_device
    check_available(nbytes, pages=plan.host is not None, mesh=plan.share is not None)


def make_tier(
    spec: ModelSpec, plan: MemoryPlan, checkpoint: Checkpoint, device: jax.Device, *, policy: str, checksums: Checksums
) -> HostTier:
    """The host pool of a plan that has one; it keeps `checkpoint` open."""
    assert plan.host is not None
    shape = {"layers": len(spec.moe_layers), "experts": spec.experts.count}
    residency = Residency(
        **shape,
        cache_slots=plan.host.places,
        staging_slots=spec.experts.count,
        policy=make_policy(policy, **shape, cache_slots=plan.host.places),
    )
    disk = DiskLink(spec, BlockReader(checkpoint, checksums=checksums), device, plan=plan.host)
    return HostTier(disk, residency, block_bytes=spec.block_bytes, passing=plan.host.passing)
