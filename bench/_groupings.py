"""Ways to put rows into groups of at most `size`, for `bench.token_scheduler`: each takes chances `[n, L, E]`."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ef_jax.schedule import token_scheduler
from ef_jax.schedule.token_scheduler import Groups, in_order

Grouping = Callable[[np.ndarray, int], Groups]

_ROUNDS = 10


def union(chances: np.ndarray, groups: Groups) -> float:
    """Experts that groups are expected to use, in sum."""
    left_out = 1 - chances
    return sum(float((1 - left_out[group].prod(axis=0)).sum()) for group in groups)


def given(chances: np.ndarray, size: int) -> Groups:
    """The order given."""
    return in_order(len(chances), size)


def shuffled(chances: np.ndarray, size: int) -> Groups:
    """At random, the same every time."""
    order = np.random.default_rng(len(chances)).permutation(len(chances)).tolist()
    return [order[first : first + size] for first in range(0, len(order), size)]


def medoids(chances: np.ndarray, size: int) -> Groups:
    """ExpertFlow-H: rows join the nearest centre by Hamming distance of the likeliest experts, as many as are used, as
    long as its group has room, those with most to lose first; the new centre is the member most like the others."""
    used = np.zeros_like(chances)
    top_k = round(float(chances.sum(axis=-1).mean()))
    np.put_along_axis(used, np.argsort(-chances, axis=-1)[..., :top_k], 1.0, axis=-1)
    used = used.reshape(len(chances), -1)
    sums = used.sum(axis=1)
    apart = sums[:, None] + sums - 2 * used @ used.T
    count = -(-len(chances) // size)
    centres = [0]
    while len(centres) < count:
        centres.append(int(apart[:, centres].min(axis=1).argmax()))
    groups = given(chances, size)
    for _ in range(_ROUNDS):
        near = apart[:, centres]
        ranked = np.sort(near, axis=1)
        groups = [[] for _ in centres]
        for row in np.argsort(ranked[:, 0] - ranked[:, 1], kind="stable").tolist():
            groups[next(at for at in np.argsort(near[row], kind="stable") if len(groups[at]) < size)].append(row)
        best = [group[int(apart[np.ix_(group, group)].sum(axis=1).argmin())] for group in groups]
        if best == centres:
            break
        centres = best
    return groups


def greedy(chances: np.ndarray, size: int) -> Groups:
    """Groups take the row that adds the fewest experts to them."""
    return token_scheduler._greedy(_left_out(chances), size)


def exchanges(chances: np.ndarray, size: int) -> Groups:
    """From the order given, rows of two groups change places as long as that helps."""
    groups = given(chances, size)
    token_scheduler._exchange(_left_out(chances), groups, size)
    return groups


def library(chances: np.ndarray, size: int) -> Groups:
    """`regroup`."""
    return token_scheduler.regroup(chances, size)


def best(chances: np.ndarray, size: int) -> Groups:
    """The smallest union of all partitions, by trying them all."""
    return min(partitions(list(range(len(chances))), size), key=lambda groups: union(chances, groups))


GROUPINGS: dict[str, Grouping] = {
    "given": given,
    "medoids": medoids,
    "greedy": greedy,
    "exchanges": exchanges,
    "regroup": library,
}


def _left_out(chances: np.ndarray) -> np.ndarray:
    return 1 - token_scheduler._looked_at(chances)


def partitions(rows: Sequence[int], size: int) -> Iterator[Groups]:
    """Every way to make ceil(n / size) groups of at most `size`."""
    if not rows:
        yield []
        return
    first, *others = rows
    left = -(-len(rows) // size)
    for more in range(min(size, len(rows))):
        for company in itertools.combinations(others, more):
            rest = [row for row in others if row not in company]
            if -(-len(rest) // size) == left - 1:
                for groups in partitions(rest, size):
                    yield [[first, *company], *groups]
