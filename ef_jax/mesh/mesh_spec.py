"""How many devices lie along each axis of a mesh, and whether a model and its sequences can be divided so.

Written as "expert=4" or "data=2,expert=4,tensor=2", or given as a mapping of these names to numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ef_jax.errors import InputError
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
        for axis in _AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"mesh {axis}={getattr(self, axis)}: give a whole number from 1")
        if self.count > MOST_DEVICES:
            raise InputError(f"mesh {self} has {self.count} devices: give {MOST_DEVICES} at most")

    def __str__(self) -> str:
        """As the option is written, axes of one device left out: "data=2,expert=4"."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in _AXES if getattr(self, axis) > 1) or "expert=1"

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
    def parse(cls, option: "MeshSpec | str | Mapping[str, Any]") -> "MeshSpec":
        """The numbers that an option gives.

        Raises:
          InputError: an axis of another name, one that comes twice, or what is no number of devices.
        """
        if isinstance(option, MeshSpec):
            return option
        return cls(**_known(_words(option) if isinstance(option, str) else option))


_AXES = tuple(field.name for field in dataclasses.fields(MeshSpec))
_ROW_AXES = ("data", "expert")


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
        axes = " x ".join(f"{axis}={getattr(mesh, axis)}" for axis in _ROW_AXES if getattr(mesh, axis) > 1)
        more = math.ceil(count / mesh.row_shards) * mesh.row_shards
        fewer = more - mesh.row_shards
        raise InputError(
            f"{name} {count} cannot be shared by {axes} evenly: give {name} "
            + (f"{fewer} or {more}" if fewer else f"{more}")
        )


def largest(spec: ModelSpec, devices: int) -> MeshSpec:
    """A mesh of all of so many devices, with as many as can be sharing the experts."""
    expert = math.gcd(devices, spec.experts.count)
    return MeshSpec(data=devices // expert, expert=expert)


def _proposals(mesh: MeshSpec, spec: ModelSpec) -> str:
    """Meshes that divide the experts: of as many devices, and of nearly as many along the axis."""
    same = largest(spec, mesh.count)
    sizes = [size for size in range(1, spec.experts.count + 1) if spec.experts.count % size == 0]
    around = [max((size for size in sizes if size < mesh.owners), default=1)]
    around += [size for size in sizes if size > mesh.owners][:1]
    others = [str(MeshSpec(data=mesh.data, expert=size)) for size in around if mesh.data * size <= MOST_DEVICES]
    return f"on as many devices give {same}, on others {' or '.join(others)}"


def _known(sizes: Mapping[str, Any]) -> dict[str, int]:
    for axis, size in sizes.items():
        if axis not in _AXES:
            raise InputError(f"mesh axis {axis!r:.60} is not one of {', '.join(_AXES)}: for example expert=4")
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
