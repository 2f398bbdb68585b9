"""Cache sizes as people write them: a share of the experts, slots, or bytes."""

import re
from typing import NamedTuple

from ef_jax.errors import InputError
from ef_jax.memory.sizes import format_bytes, parse_bytes


class Capacity(NamedTuple):
    """A cache size: the share of all experts that has a slot, as it was asked for, and the slots."""

    share: float
    slots: int


def parse_capacity(text: str, *, experts: int, block_bytes: int | None = None) -> Capacity:
    """The cache of `"0.125"` or `"12.5%"` (a share of all experts), `"208"` (slots) or `"4GiB"` (bytes of slots).

    A number up to 1 is a share, so `"1"` is every expert. A share gives the slots that an engine loaded with that
    `expert_fraction` has.

    Args:
      text: the size.
      experts: experts of the whole model, L * E.
      block_bytes: bytes of one expert's block, if known.

    Raises:
      InputError: not a size, no slot at all, or more slots than experts.
    """
    text = text.strip()
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text)
    if match is None:
        slots = _slots_of_bytes(text, block_bytes)
        share = slots / experts
    elif match[2] or float(match[1]) <= 1:
        share = float(match[1]) / (100 if match[2] else 1)
        slots = round(min(share, 2.0) * experts)
    elif match[1].isdecimal():
        slots = int(min(float(match[1]), experts + 1))
        share = slots / experts
    else:
        raise InputError(f"capacity {text!r:.60} is neither a share from 0 to 1 nor a whole number of slots")
    if slots < 1:
        raise InputError(f"capacity {text!r:.60} is no slot at all: give at least 1 of the {experts} experts a slot")
    if slots > experts:
        raise InputError(f"capacity {text!r:.60} is more than all {experts} experts: give {experts} slots at most")
    return Capacity(share, slots)


def _slots_of_bytes(text: str, block_bytes: int | None) -> int:
    try:
        size = parse_bytes(text)
    except InputError:
        message = f"capacity {text!r:.60} is not a size: write a share (0.25 or 25%), slots (208) or bytes (4GiB)"
        raise InputError(message) from None
    if block_bytes is None:
        raise InputError(
            f"capacity {text!r:.60} is in bytes, and the trace does not say how large an expert's block is: "
            "give --block-bytes"
        )
    if size < block_bytes:
        raise InputError(f"capacity {text!r:.60} is less than one block of {format_bytes(block_bytes)}: give more")
    return size // block_bytes
