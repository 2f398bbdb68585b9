"""What a sequence engine asks of whoever has the experts in slots, apart from the experts themselves."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from ef_jax.timeline import Timeline


@runtime_checkable
class StepScheduler(Protocol):
    """A `Scheduler`, or those of several devices behind one face."""

    @property
    def on_trial(self) -> bool:
        """Whether a run may find out that steps are faster without prefetching."""
        ...

    @property
    def hears(self) -> bool:
        """Whether a step that begins now would listen to predictions."""
        ...

    def listens(self) -> bool:
        """Whether the steps that follow listen to predictions."""
        ...

    def show(self, timeline: Timeline | None) -> None:
        """Note stalls and copies in `timeline` from now on; None: nowhere."""
        ...

    def begin_step(
        self,
        tokens: Sequence[int],
        ahead: UInt8[np.ndarray, "distances E"] | None = None,
        *,
        diversity: float | None = None,
        paths: UInt8[np.ndarray, "L E"] | None = None,
        following: UInt8[np.ndarray, "L E"] | None = None,
    ) -> None:
        """A decode step begins; see `Scheduler.begin_step`."""
        ...

    def note(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """A layer that could not miss chose the experts `rows`."""
        ...

    def end_run(self) -> None:
        """No step follows for now."""
        ...

    def forget(self) -> None:
        """What the slots hold is lost."""
        ...
