"""How a model lies on several devices: the axes of the mesh, and where each kind of array is on it.

| axis | what it divides |
| --- | --- |
| `data` | sequences; every group of devices along the other axes holds all experts once more |
| `expert` | sequences and, within a group, experts |
| `tensor` | the dense weights and, within a group, experts; sequences are the same along it |
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "expert", "tensor")
ROW_AXES = ("data", "expert")
"""What divides sequences, and with them key/value caches."""


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh with all of `AXES`, in this order, perhaps of size 1.

    A device has a number, its place in `devices`. Those of one `data` index are a group, and have numbers in a row; a
    device's owner number is its place in its group: what placements count.

    Attributes:
      mesh: over all processes' devices.
    """

    mesh: Mesh

    @property
    def devices(self) -> list[jax.Device]:
        """All devices, by number."""
        return list(self.mesh.devices.flat)

    @property
    def count(self) -> int:
        """Devices."""
        return int(self.mesh.devices.size)

    @property
    def data(self) -> int:
        """Groups."""
        return int(self.mesh.shape["data"])

    @property
    def expert(self) -> int:
        """Size of the axis."""
        return int(self.mesh.shape["expert"])

    @property
    def tensor(self) -> int:
        """Size of the axis."""
        return int(self.mesh.shape["tensor"])

    @property
    def owners(self) -> int:
        """Devices of a group, which share the experts."""
        return self.expert * self.tensor

    @property
    def row_shards(self) -> int:
        """Parts that sequences are divided into."""
        return self.data * self.expert

    @functools.cached_property
    def local(self) -> tuple[int, ...]:
        """Numbers of this process's devices."""
        return tuple(
            number for number, device in enumerate(self.devices) if device.process_index == jax.process_index()
        )

    def owner(self, number: int) -> int:
        """A device's place in its group."""
        return number % self.owners

    def row_shard(self, number: int) -> int:
        """Which part of the sequences a device has."""
        return number // self.tensor

    # Where arrays are.

    @functools.cached_property
    def rows(self) -> NamedSharding:
        """Arrays whose first axis is sequences."""
        return NamedSharding(self.mesh, PartitionSpec(ROW_AXES))

    @functools.cached_property
    def each(self) -> NamedSharding:
        """Arrays whose first axis counts devices, or that are each device's own parts in a row."""
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    @functools.cached_property
    def everywhere(self) -> NamedSharding:
        """Arrays that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, tree: Any, sharding: NamedSharding) -> Any:
        """Host arrays, the same in every process, as global ones; nothing is asked of other processes."""
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
        )

    @classmethod
    def of(cls, devices: list[jax.Device], *, data: int = 1, expert: int = 1, tensor: int = 1) -> "MeshLayout":
        """The layout of as many devices, in order: those of one group next to one another."""
        return cls(Mesh(np.array(devices).reshape(data, expert, tensor), AXES))


def no_mesh_set() -> contextlib.AbstractContextManager[Any]:
    """Within it, no mesh of `jax.set_mesh` is set: JAX refuses programs of single devices under one."""
    context: contextlib.AbstractContextManager[Any] = jax.set_mesh(Mesh(np.empty((), object), ()))
    return context
