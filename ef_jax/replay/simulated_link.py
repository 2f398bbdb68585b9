"""The link of a replay: a model of bandwidth and latency on a virtual clock."""

from collections.abc import Sequence

from ef_jax.memory.policies import Key
from ef_jax.schedule.link_queue import LinkQueue
from ef_jax.timeline import Timeline


class FreeLink:
    """A link that takes no time, for replays that only count."""

    bytes_moved = 0
    seconds = 0.0
    timeline: Timeline | None = None

    def start(self, layer: int, experts: Sequence[int]) -> None:
        pass

    def finish(self, blocks: None, slots: Sequence[int]) -> None:
        pass

    def settle(self) -> None:
        pass


class SimulatedLink(LinkQueue):
    """A `PrefetchLink` that moves nothing: its copies take the time that the model says, and none fails."""

    prefetches_failed = 0

    def start(self, layer: int, experts: Sequence[int]) -> float:
        """See `Link`; a copy is known by when it is across."""
        return self.demand(layer, experts)

    def finish(self, blocks: float, slots: Sequence[int]) -> None:
        """See `Link`."""
        self.wait_until(blocks)

    def settle(self) -> None:
        """See `Link`."""

    def prefetch(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        """See `PrefetchLink`."""
        self.enqueue(keys)

    def wait(self, keys: Sequence[Key]) -> None:
        """See `PrefetchLink`."""
        if keys:
            self.wait_until(max(self.take(key) for key in keys))

    def failed(self) -> list[Key]:
        """See `PrefetchLink`."""
        return []
