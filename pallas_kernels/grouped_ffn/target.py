"""What a kernel is built for: the device at hand, an H100 that is not, or the interpreter."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device as far as backends and tile configurations depend on it.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      device_kind: as jax names it, e.g. "NVIDIA H100 80GB HBM3".
      capability: CUDA compute capability, None elsewhere.
      cores: streaming multiprocessors, 0 where unknown.
      interpret: run Pallas kernels in their interpreter on this host, as if on that device. Slow; for tests.
    """

    platform: str
    device_kind: str
    capability: tuple[int, int] | None = None
    cores: int = 0
    interpret: bool = False

    def __post_init__(self) -> None:
        if self.platform == "cuda" and self.capability is None:
            raise ValueError(f"target {self.device_kind!r} on cuda needs its compute capability, e.g. (9, 0)")


def target_of(device: jax.Device) -> Target:
    """The target that `device` is; also of a compile-only device, to compile for a GPU that is not here."""
    if device.platform not in ("gpu", "cuda"):
        return Target(platform=device.platform, device_kind=device.device_kind)
    if "nvidia" not in f"{device.device_kind} {device.client.platform_version}".lower():
        return Target(platform="rocm", device_kind=device.device_kind)
    major, minor = str(device.compute_capability).split(".")
    return Target(
        platform="cuda",
        device_kind=device.device_kind,
        capability=(int(major), int(minor)),
        cores=int(getattr(device, "core_count", 0)),
    )


def default_device() -> jax.Device:
    """The device that jax computes on by default."""
    device = jax.config.values["jax_default_device"]
    return device if isinstance(device, jax.Device) else jax.devices()[0]


def default_target() -> Target:
    """The target that jax's default device is."""
    return target_of(default_device())
