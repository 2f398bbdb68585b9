"""From a mesh and a placement to what one of its devices has: the terms of the memory plan."""

from collections.abc import Sequence

import numpy as np

from ef_jax.memory.device_share import DeviceShare
from ef_jax.mesh.mesh_spec import MeshSpec
from ef_jax.mesh.tensor import undivided
from ef_jax.placement import Placement
from ef_jax.spec import ModelSpec


def held_keys(placement: Placement, owner: int) -> list[tuple[int, int]]:
    """`(MoE layer, expert)` of what a device holds, in order."""
    return [(layer, expert) for layer, expert in np.argwhere(placement.holds[..., owner]).tolist()]


def device_share(
    mesh: MeshSpec,
    placement: Placement,
    spec: ModelSpec,
    *,
    placed: str = "contiguous",
    local: Sequence[int] | None = None,
    estimated: bool = False,
) -> DeviceShare:
    """The share of the device that holds the most.

    Args:
      mesh: the devices.
      placement: of the experts on the owners of a group.
      spec: the whole model.
      placed: what to call the placement.
      local: numbers of this process's devices; None: all.
      estimated: the plan's workspace will be one, see `exchange_bytes`.
    """
    held = placement.holds.sum(axis=1)  # [L, N]
    owners = [number % mesh.owners for number in (range(mesh.count) if local is None else local)]
    return DeviceShare(
        mesh=str(mesh),
        placement=placed,
        devices=mesh.count,
        local_devices=len(owners),
        row_shards=mesh.row_shards,
        sources=mesh.expert,
        held=int(held.sum(axis=0).max()),
        most_in_layer=int(held.max()),
        host_blocks=int(held.sum(axis=0)[owners].sum()),
        whole=undivided(spec, mesh.tensor),
        estimated=estimated,
    )


def exchange_bytes(mesh: MeshSpec, spec: ModelSpec, tokens: int) -> int:
    """Device bytes of exchanging a layer's rows, were all there at once: what arrives; that sorted by expert and room
    for the outputs, of one program and of the one before it; the outputs as they are sent back; and what comes from
    every owner.

    Args:
      mesh: the devices.
      spec: the model.
      tokens: of a pass, on one device.
    """
    row, chosen = spec.hidden * spec.itemsize, tokens * spec.experts.top_k
    arrived = mesh.expert * (tokens * row + chosen * 8)
    return arrived + (6 * mesh.expert + mesh.owners) * chosen * row
