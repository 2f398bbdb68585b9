"""Compile for an H100 on a machine without one: topology, shardings and the compiled programs' figures.

Needs the packages `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's own version, and `ptxas`: a CUDA toolkit's, or
that of the packages `nvidia-cuda-nvcc` and `nvidia-nvvm`. Nothing runs, so this says nothing about numbers or speed.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MemoryKind = Literal["device", "pinned_host"]

_TARGET = Path(__file__).parent.parent / "fixtures" / "h100.txtpb"


def missing() -> str | None:
    """What this machine lacks for compiling, as a reason to skip; None where it can."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax-cuda13-plugin is not installed"
    if ptxas() is None:
        return "no ptxas: neither a CUDA toolkit nor nvidia-cuda-nvcc is installed"
    return None


def ptxas() -> str | None:
    """The assembler, of a CUDA toolkit or of the package `nvidia-cuda-nvcc`."""
    packaged = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cu13")
    folders = packaged.submodule_search_locations or [] if packaged else []
    places = ["/usr/local/cuda/bin", *(f"{folder}/bin" for folder in folders)]
    return shutil.which("ptxas") or shutil.which("ptxas", path=os.pathsep.join(places))


class _KindSharding(NamedSharding):
    """Keeps its memory kind, which a plain NamedSharding drops: compile-only devices report no memories."""

    _kind: MemoryKind

    @property
    def memory_kind(self) -> str:
        return self._kind

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and NamedSharding.__eq__(self, other)

    def __hash__(self) -> int:
        return hash((self._kind, NamedSharding.__hash__(self)))


class _DeviceSharding(_KindSharding):
    _kind = "device"


class _PinnedHostSharding(_KindSharding):
    _kind = "pinned_host"


@functools.cache
def h100() -> jax.Device:
    """The one compile-only H100; devices of two topologies cannot meet in a program."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=_TARGET.read_text(), topology="1x1x1")
    device: jax.Device = topology.devices[0]
    return device


@functools.cache
def h100s(hosts: int = 1) -> tuple[jax.Device, ...]:
    """Eight compile-only H100s, of one host or as many of each, all joined by NVLink."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET.read_text(), topology=f"1x{hosts}x{8 // hosts}"
    )
    return tuple(topology.devices)


def on_mesh(mesh: Mesh, partition: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An argument of that whole shape in the memories of a mesh's devices."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_DeviceSharding(mesh, partition))


def sharding(kind: MemoryKind = "device") -> NamedSharding:
    """Everything on the H100, or in its pinned host memory."""
    mesh = Mesh(np.array([h100()]), ("x",))
    return (_DeviceSharding if kind == "device" else _PinnedHostSharding)(mesh, PartitionSpec())


def abstract(shape: tuple[int, ...], dtype: Any, kind: MemoryKind = "device") -> jax.ShapeDtypeStruct:
    """An argument of that shape and dtype in that memory."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(kind))


def compile_for_h100(
    function: Callable[..., Any], *args: Any, compiler_options: dict[str, Any] | None = None, **jit_options: Any
) -> jax.stages.Compiled:
    """`function`, jitted with `jit_options`, compiled to sm_90a for `args` made by `abstract`.

    `memory_analysis()` of the result tells device bytes from host bytes, which the CPU backend does not.
    """
    with lowering_for_h100():
        lowered = jax.jit(function, **jit_options).lower(*args)
    return lowered.compile(compiler_options=compiler_options)


def lowering_for_h100() -> contextlib.AbstractContextManager[Any]:
    """Within it, Pallas kernels find an H100 to be lowered for. jax 0.10 does not ask for one."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind=h100().device_kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
