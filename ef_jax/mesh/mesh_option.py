"""The option `mesh` of a run: what it may be, and the layout on the devices that there are.

A mesh is given as `MeshSpec.parse` reads it, or as a `jax.sharding.Mesh` with some of its axes, whose devices are then
taken in its order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ef_jax.errors import InputError
from ef_jax.mesh.layout import AXES, MeshLayout
from ef_jax.mesh.mesh_spec import MeshSpec, check_divides_model, largest
from ef_jax.mesh.tensor import check_tensor
from ef_jax.spec import ModelSpec

MeshOption = MeshSpec | str | Mapping[str, Any] | Mesh
"""What the option may be."""


def mesh_spec(option: MeshOption) -> MeshSpec:
    """The numbers of devices that an option gives.

    Raises:
      InputError: as `MeshSpec.parse`.
    """
    return MeshSpec.parse(dict(option.shape) if isinstance(option, Mesh) else option)


def mesh_that_is_set() -> Mesh | None:
    """The mesh of `jax.set_mesh`, if it has an axis that is ours; None: there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty or not set(mesh.axis_names) & set(AXES) else mesh


def layout_for(mesh: MeshOption, spec: ModelSpec, devices: Sequence[jax.Device] | None = None) -> MeshLayout:
    """How a model lies on a mesh.

    Args:
      mesh: the option.
      spec: the model that is to be divided.
      devices: what to take them from, in order, as many as the mesh has; None: all of every process. The devices of a
        `jax.sharding.Mesh` are its own.

    Raises:
      InputError: the option cannot be read, the mesh does not divide the model, it has more devices than there are, or
        none of some process; the message proposes a mesh that does.
    """
    sizes = mesh_spec(mesh)
    check_divides_model(sizes, spec)
    check_tensor(spec, sizes.tensor)
    there = list(jax.devices() if devices is None else devices)
    if isinstance(mesh, Mesh):
        own = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
        chosen = list(mesh.devices.transpose(own).flat)
    else:
        chosen = there[: sizes.count]
    if sizes.count > len(chosen):
        more = f", or set JAX_NUM_CPU_DEVICES={sizes.count}" if there[0].platform == "cpu" else ""
        raise InputError(
            f"mesh {sizes} needs {sizes.count} devices and there {_are(len(there))}: "
            f"give {largest(spec, len(there))}{more}"
        )
    if idle := {device.process_index for device in there} - {device.process_index for device in chosen}:
        raise InputError(
            f"mesh {sizes} has no device of process {min(idle)}, which would have nothing to do: "
            f"give {largest(spec, len(there))}, or start fewer processes"
        )
    return MeshLayout.of(chosen, **dataclasses.asdict(sizes))


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
