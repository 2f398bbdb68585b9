"""Missing experts of little weight: left out of the step, or fetched and computed in 4 bits.

HOBBIT (arXiv:2411.01433) fetches missing experts that matter little in low precision. Here an expert matters as much as
its largest weight in the step. Nothing of this enters the cache: what is used again and again comes in full when it
weighs more.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ef_jax.errors import LinkError
from ef_jax.memory.host_store import HostStore
from ef_jax.runtime.miss_handlers import MissError, MissHandler
from ef_jax.runtime.programs import Programs
from ef_jax.runtime.steps import Routed
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.small_link import SmallCopy, SmallLink


class SkippedMisses:
    """A `MissHandler` that leaves out experts whose weight is below a bound: their outputs stay zeros.

    Args:
      below: the bound, of weights as the router gives them, see `weight_bound`.

    Attributes:
      counter, block_bytes, free, lingers: see `MissHandler`.
    """

    counter = "skipped"
    block_bytes = 0
    free = True
    lingers = False

    def __init__(self, below: float) -> None:
        self._below = below

    def keep(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        absent: Sequence[int],
        weights: Sequence[Sequence[float]] | None,
    ) -> list[int]:
        """See `MissHandler`."""
        return lighter(absent, rows, weights, self._below)

    def run(self, layer: int, routed: Routed, kept: Sequence[int], outputs: jax.Array) -> jax.Array:
        """See `MissHandler`."""
        return outputs

    def report(self) -> dict[str, Any]:
        """See `MissHandler`."""
        return {}


class LowPrecisionMisses:
    """A `MissHandler` that fetches experts whose weight is below a bound in 4 bits, and computes them from a pool of
    their own.

    Args:
      below: the bound, of weights as the router gives them, see `weight_bound`.
      experts: of a layer, E.
      link: copies into their pool.
      compute: the program `Programs.low`.

    Attributes:
      counter, block_bytes, free, lingers: see `MissHandler`.
    """

    counter = "low_precision"
    free = False
    lingers = False

    def __init__(self, below: float, experts: int, link: SmallLink, compute: Callable[..., Any]) -> None:
        self._below, self._experts, self._link, self._compute = below, experts, link, compute
        self.block_bytes = link.block_bytes
        self._copy: SmallCopy | None = None
        self._failed: LinkError | None = None

    def keep(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        absent: Sequence[int],
        weights: Sequence[Sequence[float]] | None,
    ) -> list[int]:
        """See `MissHandler`; starts the copies."""
        kept = lighter(absent, rows, weights, self._below)
        self._copy = self._failed = None
        if kept:
            try:
                self._copy = self._link.start(layer, kept)
            except LinkError as error:
                self._failed = error
        return kept

    def run(self, layer: int, routed: Routed, kept: Sequence[int], outputs: jax.Array) -> jax.Array:
        """See `MissHandler`.

        Raises:
          MissError: the blocks of low precision do not come.
        """
        slot_row = np.full(self._experts, -1, np.int32)
        slot_row[kept] = slots = np.arange(len(kept), dtype=np.int32)
        try:
            if self._copy is None:
                raise MissError(str(self._failed)) from self._failed
            self._link.finish(self._copy, slots.tolist())
        except LinkError as error:
            raise MissError(str(error)) from error
        computed: jax.Array = self._compute(routed, self._link.pool.array, slot_row, outputs)
        return computed

    def report(self) -> dict[str, Any]:
        """See `MissHandler`."""
        return {}


def lighter(
    experts: Sequence[int], rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None, below: float
) -> list[int]:
    """Those of the distinct `experts` whose weight is below a bound in every row.

    Args:
      experts: some of those in `rows`.
      rows: the experts of each sequence.
      weights: the weight of each of `rows`.
      below: the bound.
    """
    if weights is None:
        raise ValueError("misses are to be weighed, and the programs report no weights")
    heavy = {
        expert
        for row, of_row in zip(rows, weights, strict=True)
        for expert, weight in zip(row, of_row, strict=True)
        if not weight < below
    }
    return [expert for expert in experts if expert not in heavy]


def light_misses(
    programs: Programs, link: DeviceLink | EmulatedLink, store: HostStore | None, device: jax.Device, *, mode: str
) -> list[MissHandler]:
    """The handlers that the lossy options of `programs` ask for, in the order in which they are to be asked.

    Args:
      programs: of the engine.
      link: of the model's own blocks.
      store: their copies in 4 bits; None where no option asks for them.
      device: the engine's.
      mode: how blocks cross the link, see `DeviceLink`.
    """
    lossy, scale, low = programs.lossy, programs.spec.router.scale, programs.low_precision
    handlers: list[MissHandler] = []
    if lossy.skip is not None:
        handlers.append(SkippedMisses(weight_bound(lossy.skip, scale)))
    if lossy.low_precision_miss is not None and low is not None and store is not None:
        small = SmallLink(DeviceLink(low.spec, store, device, slots=low.slots, mode=mode), link)
        bound = weight_bound(lossy.low_precision_miss, scale)
        handlers.append(LowPrecisionMisses(bound, low.spec.experts.count, small, programs.low()))
    return handlers


def weight_bound(option: float, scale: float) -> float:
    """The bound on weights as the router gives them, the model's factor `scale` in them; an option of 1 has none."""
    return math.inf if option >= 1 else option * scale
