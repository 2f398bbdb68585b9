"""A fixed hot set."""

from collections.abc import Collection, Sequence

from ef_jax.memory.policies.base import Key, Policy


class Static(Policy):
    """Whatever first fills the cache stays; every other expert passes through staging."""

    def victims(
        self, layer: int, missing: Sequence[int], needed: Collection[int], spare: Sequence[int]
    ) -> Sequence[Key | None]:
        return [None] * len(missing)
