"""`Placement`: the table that says which devices hold each expert, and which of them serves whom."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64, Int16

from ef_jax.errors import InputError

Flows = Float64[np.ndarray, "L E N"]
"""Rows that the tokens of each device send to each expert."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Experts of L layers on N devices.

    Attributes:
      holds: bool `[L, E, N]`, the devices that hold each expert; at least one.
      serves: int16 `[L, E, N]`, the device that computes an expert for the tokens of each device: itself where it holds
        the expert.

    Raises:
      InputError: an expert that no device holds, or that is to be served by one that does not hold it.
    """

    holds: Bool[np.ndarray, "L E N"]
    serves: Int16[np.ndarray, "L E N"]

    def __post_init__(self) -> None:
        if not (held := self.holds.any(axis=-1)).all():
            layer, expert = np.argwhere(~held)[0].tolist()
            raise InputError(f"no device holds expert {expert} of MoE layer {layer}: give it one")
        if not np.take_along_axis(self.holds, self.serves.astype(np.int64), axis=-1).all():
            raise InputError("an expert is to be served by a device that does not hold it")

    @property
    def devices(self) -> int:
        """N."""
        return int(self.holds.shape[-1])

    @property
    def copies(self) -> int:
        """Experts held, on all devices together: L * E and the replicas."""
        return int(self.holds.sum())

    def local_rows(self, flows: Flows) -> float:
        """Of the rows in `flows`, those that stay on their device."""
        return float(flows[self.holds].sum())

    def load(self, flows: Flows) -> Float64[np.ndarray, "L N"]:
        """Rows that each device computes in each layer."""
        layers, _, devices = self.holds.shape
        load = np.zeros((layers, devices))
        for layer in range(layers):
            np.add.at(load[layer], self.serves[layer].ravel(), flows[layer].ravel())
        return load

    @classmethod
    def of(cls, holds: Bool[np.ndarray, "L E N"], flows: Flows | None = None) -> "Placement":
        """The placement with these holders. Where an expert is held elsewhere only, the holder with the least to do so
        far serves it, the largest of `flows` choosing first; without flows, holders take turns.

        Raises:
          InputError: an expert that no device holds.
        """
        layers, _, devices = holds.shape
        own = np.broadcast_to(np.arange(devices), holds.shape)
        serves = np.where(holds, own, -1).astype(np.int16)
        load = np.zeros((layers, devices))
        weight = np.ones(holds.shape) if flows is None else flows
        np.add.at(load, (np.nonzero(holds)[0], np.nonzero(holds)[2]), weight[holds])
        for layer in range(layers):
            apart = np.argwhere(~holds[layer])
            largest_first = np.argsort(-weight[layer][~holds[layer]], kind="stable")
            for expert, device in apart[largest_first].tolist():
                holders = np.flatnonzero(holds[layer, expert])
                if not len(holders):
                    break  # the constructor says which
                serves[layer, expert, device] = server = holders[np.argmin(load[layer, holders])]
                load[layer, server] += weight[layer, expert, device]
        return cls(holds=holds, serves=np.maximum(serves, 0))

    @classmethod
    def contiguous(cls, *, layers: int, experts: int, devices: int) -> "Placement":
        """Experts in order, as many to each device.

        Raises:
          InputError: the devices do not divide the experts.
        """
        check_divides(experts, devices)
        home = np.arange(experts) // (experts // devices)
        return cls.of(np.broadcast_to(home[:, None] == np.arange(devices), (layers, experts, devices)).copy())


def check_divides(experts: int, devices: int) -> None:
    """Refuse devices that do not divide the experts of a layer.

    Raises:
      InputError: naming numbers that do.
    """
    if not 1 <= devices <= experts or experts % devices:
        fits = [count for count in range(1, experts + 1) if experts % count == 0]
        nearest = sorted(sorted(fits, key=lambda count: abs(count - devices))[:3])
        raise InputError(
            f"{experts} experts cannot be shared by {devices} devices evenly: give "
            f"{', '.join(map(str, nearest[:-1]))} or {nearest[-1]}"
            if len(nearest) > 1
            else f"{experts} expert cannot be shared by {devices} devices: give {nearest[0]}"
        )
