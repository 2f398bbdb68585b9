"""Which of the sequences that are being decoded share a step: those whose tokens use the same experts.

ExpertFlow-H (arXiv:2410.17954) calls it the token scheduler. A step copies an expert once, however many of its tokens
use it, so what counts is the union of experts over a step's tokens, added up over the steps. Results do not depend on
it.
"""

import itertools

import numpy as np
from jaxtyping import Float, Float32, UInt8

from ef_jax.errors import InputError
from ef_jax.predict.log_odds import NOMINAL

_MOST = np.float32(0.98)  # one row never makes an expert certain, so that it can be taken out of a union again
_COLUMNS = 896  # (layer, expert) pairs looked at
_ROWS = 64  # that are told apart at a time, or two groups of them
_SWEEPS = 2
_TRIALS = 120  # of two groups against each other
_LEAST_GAIN = 1e-3  # experts

Groups = list[list[int]]


def regroup(paths: UInt8[np.ndarray, "n L E"] | Float[np.ndarray, "n L E"], size: int) -> Groups:
    """Groups of rows whose unions of experts are expected to be small in sum.

    Rows join groups one by one, each group taking the row that adds the fewest experts to it; then rows of two groups
    change places as long as that helps. The value of every exchange between two groups follows from one matrix product:
    an expert is left out by a group with probability prod_i (1 - p_i), which a change multiplies by
    (1 - p_in) / (1 - p_out). The result is never worse, by this estimate, than the order given.

    Rows can be told apart by every few layers, so about 900 pairs of layer and expert are looked at: 0.7 ms for 64 rows
    of 48 layers x 128 experts in groups of 32, 1.2 ms in groups of 16 (`bench.token_scheduler`). More rows than 64 are
    grouped 64 at a time, in the order given.

    Compared there on tokens of different prompts of DeepSeek-V2-Lite: experts used, % of those of random groups, by
    predictions from token ids alone, by a trained routing path, and by true routes. The paper takes medoids by Hamming
    distance.

    | rows in groups of | medoids | greedy | exchanges from the order given | greedy, then exchanges |
    | --- | --- | --- | --- | --- |
    | 16 in 8 | 92.7, 92.5, 90.9 | 90.8, 91.3, 89.6 | 92.8, 92.0, 91.0 | 90.7, 90.3, 88.6 |
    | 64 in 32 | 93.3, 93.2, 91.3 | 91.7, 91.1, 88.4 | 93.1, 93.9, 94.2 | 91.0, 91.0, 87.8 |
    | 64 in 16 | 84.3, 83.0, 80.2 | 82.8, 81.8, 78.4 | 83.8, 84.4, 82.3 | 82.0, 81.2, 77.1 |
    | 64 in 8 | 82.7, 81.7, 78.5 | 82.4, 80.6, 76.4 | 81.6, 81.0, 77.6 | 80.9, 79.4, 75.0 |

    The smallest unions there are for 10 rows in groups of 5, found by trying all, are 92.9 by the routing path and
    91.4 by true routes; this gives 93.1 and 91.8.

    Args:
      paths: what each row's token is expected to use: bins of `predict.log_odds`, or probabilities.
      size: rows of a group at most.

    Returns:
      ceil(n / size) groups of rows, each in rising order, the groups in the order of their first rows.

    Raises:
      InputError: paths that are no probabilities, or a size below 1.
    """
    if size < 1:
        raise InputError(f"groups of {size} rows: give at least 1")
    part = size * max(2, _ROWS // size)
    groups = []
    for first in range(0, len(paths), part):
        groups += [[first + row for row in group] for group in _regroup(paths[first : first + part], size)]
    return groups


def in_order(rows: int, size: int) -> Groups:
    """Groups of `size` rows in the order of rows; the last may be smaller."""
    return [list(range(first, min(first + size, rows))) for first in range(0, rows, size)]


def _regroup(paths: np.ndarray, size: int) -> Groups:
    """`regroup` for rows that are not too many."""
    given = in_order(len(paths), size)
    if size == 1 or len(given) < 2:
        return given
    left_out = 1 - _looked_at(paths)
    groups = _greedy(left_out, size)
    _exchange(left_out, groups, size)
    if _spared(left_out, groups) <= _spared(left_out, given):
        return given
    return sorted(sorted(group) for group in groups)


def _looked_at(paths: np.ndarray) -> Float32[np.ndarray, "n J"]:
    """Probabilities that each row uses an expert, of every few layers."""
    rows, layers, experts = paths.shape
    stride = -(-layers * experts // _COLUMNS)
    part = paths[:, ::stride].reshape(rows, -1)
    if part.dtype == np.uint8:
        return np.minimum(NOMINAL, _MOST)[part]
    if part.size and not (part.min() >= 0 and part.max() <= 1):
        raise InputError(f"paths hold {part.min():g} to {part.max():g}: give probabilities, or bins of log-odds")
    return np.minimum(part, _MOST).astype(np.float32)


def _spared(left_out: Float32[np.ndarray, "n J"], groups: Groups) -> float:
    """How many pairs of group and expert are expected to have nothing to do with one another."""
    return sum(float(left_out[group].prod(axis=0).sum()) for group in groups)


def _greedy(left_out: Float32[np.ndarray, "n J"], size: int) -> Groups:
    """Groups that take, one after another, the row that adds least to them."""
    rows = np.arange(len(left_out))
    groups = []
    while len(rows) > size:
        chances = 1 - left_out[rows]
        taken = np.zeros(len(rows), np.float32)
        free = left_out[rows[0]].copy()
        taken[0] = np.inf
        group = [0]
        for _ in range(size - 1):
            best = int((chances @ free + taken).argmin())
            group.append(best)
            taken[best] = np.inf
            free *= left_out[rows[best]]
        groups.append(rows[group].tolist())
        rows = rows[taken == 0]
    return [*groups, rows.tolist()]


def _exchange(left_out: Float32[np.ndarray, "n J"], groups: Groups, size: int) -> None:
    """Let rows of every two groups change places, in `groups`, a few times or until nothing is gained."""
    empty = len(left_out)  # a place that nobody has taken
    left_out = np.vstack([left_out, np.ones((1, left_out.shape[1]), np.float32)])
    back = 1 / left_out
    full = [group + [empty] * (size - len(group)) for group in groups]
    spared = [left_out[group].prod(axis=0) for group in full]
    unmoved: set[tuple[int, int]] = set()
    sweeps = itertools.chain.from_iterable(itertools.combinations(range(len(full)), 2) for _ in range(_SWEEPS))
    for pair in itertools.islice(sweeps, _TRIALS):
        if pair not in unmoved:
            one, other = (full[index] for index in pair)
            mine, theirs = (spared[index] for index in pair)
            gains = (mine * back[one]) @ left_out[other].T + left_out[one] @ (theirs * back[other]).T
            gains -= mine.sum() + theirs.sum()
            if _swap(left_out, one, other, gains):
                unmoved = {known for known in unmoved if not {*known} & {*pair}}
                for index in pair:
                    spared[index] = left_out[full[index]].prod(axis=0)
            else:
                unmoved.add(pair)
    groups[:] = [[row for row in group if row != empty] for group in full]


def _swap(
    left_out: Float32[np.ndarray, "n J"], one: list[int], other: list[int], gains: Float32[np.ndarray, "s s"]
) -> bool:
    """Make the best exchange between two groups, and with it as many of the next best as add to it."""
    best = float(gains.max())
    if best <= _LEAST_GAIN:
        return False
    before = _spared(left_out, [one, other])
    changes: list[tuple[int, int]] = []
    while gains.max() > _LEAST_GAIN:
        mine, theirs = divmod(int(gains.argmax()), gains.shape[1])
        changes.append((mine, theirs))
        gains[mine], gains[:, theirs] = -np.inf, -np.inf
    while True:
        new_one, new_other = list(one), list(other)
        for mine, theirs in changes:
            new_one[mine], new_other[theirs] = other[theirs], one[mine]
        if len(changes) == 1 or _spared(left_out, [new_one, new_other]) >= before + best:
            break
        del changes[len(changes) // 2 :]
    one[:], other[:] = new_one, new_other
    return True
