"""The option `mesh`: how many devices lie along each axis, and whether a model can be divided so.

A mesh is written as "expert=4" or "data=2,expert=4,tensor=2", given as a mapping of these names to numbers, or as a
`jax.sharding.Mesh` with some of these axes, whose devices are then taken in its order.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ef_jax.errors import InputError
from ef_jax.mesh.layout import AXES, ROW_AXES, MeshLayout
from ef_jax.spec import ModelSpec

MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshSpec:
    """Numbers of devices along the axes of `MeshLayout`.

    Raises:
      InputError: a number below 1, or more than `MOST_DEVICES` in all.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"mesh {axis}={getattr(self, axis)}: give a whole number from 1")
        if self.count > MOST_DEVICES:
            raise InputError(f"mesh {self} has {self.count} devices: give {MOST_DEVICES} at most")

    def __str__(self) -> str:
        """As the option is written, axes of one device left out: "data=2,expert=4"."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "expert=1"

    @property
    def count(self) -> int:
        """Devices."""
        return self.data * self.expert * self.tensor

    @property
    def owners(self) -> int:
        """Devices of a group, which share the experts."""
        return self.expert * self.tensor

    @property
    def row_shards(self) -> int:
        """Parts that sequences are divided into."""
        return self.data * self.expert

    @classmethod
    def parse(cls, option: "MeshOption") -> "MeshSpec":
        """The numbers that an option gives.

        Raises:
          InputError: an axis of another name, one that comes twice, or what is no number of devices.
        """
        if isinstance(option, MeshSpec):
            return option
        if isinstance(option, Mesh):
            return cls(**_known(dict(option.shape)))
        return cls(**_known(_words(option) if isinstance(option, str) else option))


MeshOption = MeshSpec | str | Mapping[str, Any] | Mesh
"""What the option may be."""


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
    sizes = MeshSpec.parse(mesh)
    check_divides_model(sizes, spec)
    there = list(jax.devices() if devices is None else devices)
    if isinstance(mesh, Mesh):
        own = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
        chosen = list(mesh.devices.transpose(own).flat)
    else:
        chosen = there[: sizes.count]
    if sizes.count > len(chosen):
        raise InputError(
            f"mesh {sizes} needs {sizes.count} devices and there {_are(len(there))}: give {_largest(spec, len(there))}"
        )
    if idle := {device.process_index for device in there} - {device.process_index for device in chosen}:
        raise InputError(
            f"mesh {sizes} has no device of process {min(idle)}, which would have nothing to do: "
            f"give {_largest(spec, len(there))}, or start fewer processes"
        )
    return MeshLayout.of(chosen, **dataclasses.asdict(sizes))


def check_divides_model(mesh: MeshSpec, spec: ModelSpec) -> None:
    """Refuse a mesh that cannot share a layer's experts out evenly.

    Raises:
      InputError: naming meshes that can.
    """
    experts = spec.experts.count
    if experts % mesh.owners:
        shared = f"{mesh.owners} devices" if mesh.tensor == 1 else f"{mesh.expert} x {mesh.tensor} (expert x tensor)"
        raise InputError(
            f"mesh {mesh}: {experts} experts a layer cannot be shared by {shared}: {_proposals(mesh, spec)}"
        )


def check_divides_rows(mesh: MeshSpec, count: int, name: str = "batch") -> None:
    """Refuse sequences that the mesh cannot share out evenly; `name` is the option's.

    Raises:
      InputError: naming the next number that it can.
    """
    if count % mesh.row_shards:
        axes = " x ".join(f"{axis}={getattr(mesh, axis)}" for axis in ROW_AXES if getattr(mesh, axis) > 1)
        more = math.ceil(count / mesh.row_shards) * mesh.row_shards
        fewer = more - mesh.row_shards
        raise InputError(
            f"{name} {count} cannot be shared by {axes} evenly: give {name} "
            + (f"{fewer} or {more}" if fewer else f"{more}")
        )


def _proposals(mesh: MeshSpec, spec: ModelSpec) -> str:
    """Meshes that divide the experts: of as many devices, and of nearly as many along the axis."""
    same = _largest(spec, mesh.count)
    sizes = [size for size in range(1, spec.experts.count + 1) if spec.experts.count % size == 0]
    around = [max((size for size in sizes if size < mesh.owners), default=1)]
    around += [size for size in sizes if size > mesh.owners][:1]
    others = [str(MeshSpec(data=mesh.data, expert=size)) for size in around if mesh.data * size <= MOST_DEVICES]
    return f"on as many devices give {same}, on others {' or '.join(others)}"


def _largest(spec: ModelSpec, devices: int) -> MeshSpec:
    """A mesh of all of so many devices, with as many as can be sharing the experts."""
    expert = math.gcd(devices, spec.experts.count)
    return MeshSpec(data=devices // expert, expert=expert)


def _known(sizes: Mapping[str, Any]) -> dict[str, int]:
    for axis, size in sizes.items():
        if axis not in AXES:
            raise InputError(f"mesh axis {axis!r:.60} is not one of {', '.join(AXES)}: for example expert=4")
        if isinstance(size, bool) or not isinstance(size, int):
            raise InputError(f"mesh {axis}={size!r:.60}: give a whole number from 1")
    return dict(sizes)


def _words(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for word in text.split(","):
        axis, equals, count = (part.strip() for part in word.partition("="))
        if not equals or not (count.isascii() and count.isdecimal() and len(count) < 10):
            raise InputError(f"mesh {text!r:.60}: write axis=N, for example expert=4 or data=2,expert=4")
        if axis in sizes:
            raise InputError(f"mesh {text!r:.60} gives {axis} twice")
        sizes[axis] = int(count)
    return sizes


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
