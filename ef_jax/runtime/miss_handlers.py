"""Who may see to absent experts of a decode step otherwise than by copying them into slots."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from ef_jax.runtime.steps import Routed


@runtime_checkable
class MissHandler(Protocol):
    """Is offered the experts of a layer that are neither in a slot nor on their way, and may keep some for itself.

    What it keeps is not copied and gets no slot: in the layer's slot row it stays -1, so that the programs leave its
    rows of `outputs` as they are. Policies, predictors and traces hear of it as of any expert.

    Attributes:
      counter: the list of `PhaseStats` that counts the experts that it has seen to.
      block_bytes: what each of them moves over the link in low precision; mostly 0.
      free: seeing to them takes no time, so there is nothing to run in the meantime.
      lingers: their blocks are to be copied when the link has nothing else to do, for the next time.
    """

    counter: str
    block_bytes: int
    free: bool
    lingers: bool

    def keep(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        absent: Sequence[int],
        weights: Sequence[Sequence[float]] | None,
    ) -> list[int]:
        """What it keeps of the distinct experts `absent`, a layer of a step at a time; never waits.

        Args:
          layer: MoE layer.
          rows: the experts of each active sequence in the order of their places, in the router's order.
          absent: what handlers before it have not kept, in the order of `rows`.
          weights: the router's weight of each of `rows`; None where the programs do not report them.
        """
        ...

    def run(self, layer: int, routed: Routed, kept: Sequence[int], outputs: jax.Array) -> jax.Array:
        """`outputs` with the rows of the experts that it kept filled. It may wait.

        The other experts' copies have been started by then, and not been waited for; those that are resident may have
        run.

        Args:
          layer: MoE layer.
          routed: the layer's router's results, on the device.
          kept: as `keep` has returned it, not empty.
          outputs: `[M, D]` on the device, rows in the order of `run_experts`; not to be donated.

        Raises:
          MissError: it cannot, and the experts are to be copied after all.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What it goes by, as plain JSON types, for `Stats.miss`; nothing if there is nothing to say."""
        ...


class MissError(Exception):
    """A handler cannot see to what it has kept."""
