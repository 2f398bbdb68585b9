"""Byte counts as people write them."""

import math
import re

from ef_jax.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes of `"8GiB"`, `"500 MB"`, `"1.5g"` or a plain number (kB, MB, GB are decimal; k, m, g binary).

    Raises:
      InputError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    value = float(match[1]) * unit if match and unit else math.nan
    if not (1 <= value < 2**60):
        raise InputError(f"{text!r} is not a size in bytes: write for example 8GiB, 500MB or 1073741824")
    return int(value)


def format_bytes(count: int) -> str:
    """`count` bytes with a decimal unit and three significant digits, as disk and link figures are given."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
