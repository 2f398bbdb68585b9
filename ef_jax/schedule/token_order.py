"""In what order a decode step's rows run: those whose experts are there before those whose experts are on their way.

ExpertFlow-S (arXiv:2510.26730) calls it cache-aware routing. Only the time at which a row runs changes: rows do not
depend on one another, and each token's outputs are summed in the router's order, so not a bit of the result does.
"""

from typing import Any, Literal

from ef_jax.choices import chosen
from ef_jax.memory.residency import Admission
from ef_jax.schedule.link import Link, PrefetchLink

Order = Literal["auto", "resident_first", "together"]

_WORTH_A_DISPATCH = 2e-4  # seconds of waiting that are worth one more dispatch: about two of them (platform figures)


def check_order(order: str) -> Order:
    """`order`, if there is one of that name.

    Raises:
      InputError: there is none.
    """
    return chosen("order", order, Order)


def run_there_first(order: Order, admission: Admission, link: Link[Any], *, free: int = 0) -> bool:
    """Whether the rows of resident experts run while the others' blocks come.

    "auto": where the link says how long a block takes and what is on its way will be waited for longer than the
    additional dispatch takes; what is seen to otherwise counts as if it were on its way. Never where nothing is
    resident. `free` experts of those that are seen to otherwise take no time.
    """
    coming = len(admission.missing) + len(admission.late) + len(admission.left) - free
    if order == "together" or not admission.hits or not coming:
        return False
    if order == "resident_first":
        return True
    if not isinstance(link, PrefetchLink):
        return False
    return coming * link.pace.block_seconds > _WORTH_A_DISPATCH
