"""Times of work that is over in an instant."""

import time
from collections.abc import Callable

_SECONDS = 0.15
_FEWEST, _MOST = 3, 200


def least_seconds(work: Callable[[], object], *, seconds: float = _SECONDS) -> float:
    """The shortest of several runs of `work`, after one that does not count; they take `seconds` in all, or 3 runs.

    The shortest, because whatever else runs on a machine only adds time.
    """
    work()
    samples: list[float] = []
    while len(samples) < _FEWEST or (sum(samples) < seconds and len(samples) < _MOST):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return max(min(samples), 1e-9)
