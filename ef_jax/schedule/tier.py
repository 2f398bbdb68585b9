"""What the scheduler asks of the tier below host memory's blocks, where part of them is on disk."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from ef_jax.memory.residency import Residency
from ef_jax.predict.predictor import Predictor
from ef_jax.stats import DiskStats
from ef_jax.timeline import Timeline


@runtime_checkable
class Tier(Protocol):
    """Blocks that host memory holds, and those that come from disk: a `HostTier`.

    Attributes:
      residency: the table of the places in host memory.
      stats: counters that it adds to.
    """

    residency: Residency
    stats: DiskStats

    def listen(self, predictor: Predictor, device: Residency, *, most_wasted: float = 1.0) -> None:
        """Read ahead what `predictor` says will be used and what the slots of `device` do not have."""
        ...

    def show(self, timeline: Timeline | None) -> None:
        """Note reads in `timeline` from now on; None: nowhere."""
        ...

    def begin_step(self, tokens: Sequence[int], diversity: float | None, *, listens: bool) -> None:
        """A decode step begins; `tokens` as for `Policy.on_step`."""
        ...

    def gate(self) -> None:
        """A layer is about to ask."""
        ...

    def plan(self, layer: int) -> None:
        """A layer has asked for all that it needs: read ahead for those after it. -1: before layer 0."""
        ...

    def prompt(self, layer: int, experts: Sequence[int]) -> None:
        """The waves of a prompt will ask for `experts` of a layer, in this order."""
        ...

    def end_prompt(self, layer: int, counts: Int[np.ndarray, "E"]) -> None:
        """All waves of a layer have been asked for; `counts` as for `Policy.on_prompt`."""
        ...

    def abandon(self) -> None:
        """Forget what is on its way, after an error."""
        ...

    def end_run(self) -> None:
        """Nothing follows for now."""
        ...
