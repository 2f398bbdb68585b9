"""What every backend offers: a file of its own, one `Backend` in it, and a row in the table of `backends`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from pallas_kernels.grouped_ffn.problem import Problem
from pallas_kernels.grouped_ffn.tiles import Operation, Tiles


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Three operations over route-sorted rows, and when they cannot run.

    Attributes:
      name: as `implementation` names it.
      refuses: why this problem cannot run here, or None. It looks at the problem only, and never raises.
      ffn: `(x [M, D], pool, biases or None, slot_of_group [G], group_sizes [G] or None, out [M, D], problem)
        -> [M, D]`.
      matmul: `(x [M, C], pool [S, P, A, B], slot_of_group, group_sizes, out [M, N], problem, part, contract_last)
        -> [M, N]`: rows times part `part` of their group's block; C is B and N is A with `contract_last`, else C is A
        and N is B. The result has `out`'s dtype.
      outer: `(a [M, A], b [M, B], slot_of_group, group_sizes, problem) -> float32 [S, A, B]`: for each slot, the sum
        over its groups' rows of the outer products, zeros for slots that no row uses (the gradient of weights).
      candidates: `(operation, problem) ->` tiles for the tuner to try, the heuristic's own first; none where there is
        nothing to tune.

    `ffn` and `matmul` leave rows of skipped groups (slot -1), and rows past the last group, as `out` has them.
    """

    name: str
    refuses: Callable[[Problem], str | None]
    ffn: Callable[..., jax.Array]
    matmul: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    candidates: Callable[[Operation, Problem], Sequence[Tiles]] = lambda operation, problem: ()
