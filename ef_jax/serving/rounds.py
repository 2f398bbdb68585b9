"""Which rows take the next decode step, where more are decoding than a step can take."""

from collections.abc import Callable, Sequence

from ef_jax.serving.request import Request

Group = Callable[[Sequence[Request], int], list[list[Request]]]


class Rounds:
    """Rounds in which every decoding request gets a step, in groups of at most `size`.

    Groups are made when a round begins. Whoever begins to decode meanwhile, and after them those whose last step is
    longest ago, fill places of a group that would stay empty. So fewer steps lie between two of one request than two
    rounds have groups, and no step is narrower than it must be.
    """

    def __init__(self, size: int, group: Group) -> None:
        """`size`: B. `group`: cuts requests into groups of at most `size`, each request in one."""
        self._size, self._group = size, group
        self._groups: list[list[Request]] = []
        self._stepped: dict[Request, int] = {}
        self._steps = 0

    def next(self, decoding: Sequence[Request]) -> list[Request]:
        """The requests of the next step.

        Args:
          decoding: all that could take one, 1 or more, in order of arrival.

        Returns:
          At most `size` of them.
        """
        self._stepped = {request: self._stepped.get(request, -1) for request in decoding}
        groups = ([request for request in group if request in self._stepped] for group in self._groups)
        self._groups = [group for group in groups if group]
        if not self._groups:
            alone = len(decoding) <= self._size
            self._groups = [list(decoding)] if alone else self._group(decoding, self._size)
        group = self._groups.pop(0)
        if len(group) < self._size:
            taken = {*group, *(request for later in self._groups for request in later)}
            idle = sorted((request for request in decoding if request not in taken), key=self._stepped.__getitem__)
            group += idle[: self._size - len(group)]
        self._steps += 1
        self._stepped.update(dict.fromkeys(group, self._steps))
        return group

    @property
    def upcoming(self) -> Sequence[Request]:
        """The requests of the step after the last `next`, but for places that are still to be filled; none where the
        round is over with it."""
        return self._groups[0] if self._groups else ()
