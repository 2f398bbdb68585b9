"""`Machine`: the figures of a device, its host and the link between them that a forecast goes by."""

import dataclasses
import math
from typing import Any, Literal, get_args

from ef_jax.errors import InputError
from ef_jax.schedule.link_model import LinkModel

Platform = Literal["gpu", "cpu"]

_MUST_BE_POSITIVE = (
    "device_memory", "host_memory", "device_bandwidth", "device_flops", "link_bandwidth", "insert_bandwidth",
    "disk_bandwidth", "host_bandwidth", "host_flops",
)  # fmt: skip
_MAY_BE_ZERO = ("link_latency", "block_seconds", "dispatch_seconds", "kernel_seconds", "miss_seconds", "row_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a forecast has to know of a machine. Bandwidths are bytes a second, times are seconds.

    Attributes:
      name: what to call it.
      platform: what computes. A "cpu" computes in the memory that holds the experts, and its copies take the cores that
        compute, so that nothing overlaps; on a "gpu" copies cross while it computes.
      device_memory: bytes that JAX offers on the device.
      host_memory: bytes of RAM.
      device_bandwidth: at which decoding reads weights and caches.
      device_flops: operations a second of matrix products in the model's dtype.
      link_bandwidth: of large copies from pinned host memory to the device, one way.
      link_latency: of a call that copies.
      insert_bandwidth: at which blocks that have crossed enter their slots; None: crossing is entering.
      block_seconds: what each block takes besides its bytes.
      dispatch_seconds: host time of a layer of a step.
      kernel_seconds: what the device takes for a layer besides reading and multiplying.
      miss_seconds: further host time of a layer that may miss: the routes are read back and looked up.
      row_seconds: what each sequence of a step but the first adds to a layer besides bytes and products.
      disk_bandwidth: of reading a checkpoint.
      host_bandwidth: at which the CPU copies memory, bytes read.
      host_flops: operations a second of matrix products on the CPU.
      doubt: how far figures may be off, as a share: bandwidths and rates are within `1 - doubt` and `1 + doubt` of what
        is said, times within `1 / (1 + 2 doubt)` and `1 + 2 doubt`.
      source: where the figures are from.

    Raises:
      InputError: a figure that no machine has.
    """

    name: str
    platform: Platform
    device_memory: int
    host_memory: int
    device_bandwidth: float
    device_flops: float
    link_bandwidth: float
    link_latency: float
    insert_bandwidth: float | None
    block_seconds: float
    dispatch_seconds: float
    kernel_seconds: float
    miss_seconds: float
    row_seconds: float
    disk_bandwidth: float
    host_bandwidth: float
    host_flops: float
    doubt: float
    source: str

    def __post_init__(self) -> None:
        _check(dataclasses.asdict(self))

    def with_link(self, link: LinkModel) -> "Machine":
        """This machine with another link. A CPU's is emulated: blocks are held back by it, then enter their slots as
        fast as they cross without one."""
        insert = self.insert_bandwidth
        if self.platform == "cpu" and insert is None:
            insert = self.link_bandwidth
        return dataclasses.replace(
            self,
            link_bandwidth=link.bandwidth,
            link_latency=link.latency or self.link_latency,
            insert_bandwidth=insert,
        )

    def leaning(self, way: Literal[-1, 0, 1]) -> "Machine":
        """This machine with all figures at the bad (-1) or the good (1) end of what `doubt` allows."""
        if way == 0:
            return self
        rate, time = 1 + way * self.doubt, (1 + 2 * self.doubt) ** -way
        rates = ("device_bandwidth", "device_flops", "link_bandwidth", "insert_bandwidth", "disk_bandwidth")
        changed = {name: value * rate for name in rates if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **changed, **{name: getattr(self, name) * time for name in _MAY_BE_ZERO})

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "Machine":
        """The machine that `as_dict` described.

        Raises:
          InputError: fields are missing or unknown, or have values that no machine has.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or (wrong := names ^ data.keys()):
            found = sorted(wrong) if isinstance(data, dict) else type(data).__name__
            raise InputError(f"not the figures of a machine: missing or unknown are {found!s:.200}")
        _check(data)
        return cls(**data)


def _check(figures: dict[str, Any]) -> None:
    """Refuse figures that no machine has, of any type."""
    name = figures["name"]
    if not isinstance(name, str) or not isinstance(figures["source"], str):
        raise InputError(f"a machine's name and source are text, got {name!r:.60} and {figures['source']!r:.60}")
    if figures["platform"] not in get_args(Platform):
        raise InputError(f"machine {name!r:.60}: platform {figures['platform']!r:.60} is neither gpu nor cpu")
    for names, zero in ((_MUST_BE_POSITIVE, False), (_MAY_BE_ZERO, True)):
        for figure in names:
            value = figures[figure]
            if figure == "insert_bandwidth" and value is None:
                continue
            if not _is_number(value) or not (0 <= value < math.inf) or (value == 0 and not zero):
                least = "0 or more" if zero else "more than 0"
                raise InputError(f"machine {name!r:.60}: {figure} is {value!r:.60}, and must be {least}")
            if figure.endswith("_memory") and not isinstance(value, int):
                raise InputError(f"machine {name!r:.60}: {figure} is {value!r:.60}, and must be whole bytes")
    doubt = figures["doubt"]
    if not _is_number(doubt) or not 0 <= doubt < 1:
        raise InputError(f"machine {name!r:.60}: doubt is {doubt!r:.60}, and must be from 0 to below 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
