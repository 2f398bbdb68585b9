"""Durations and bandwidths as people write them."""

import re

from ef_jax.errors import InputError
from ef_jax.memory.sizes import format_bytes, parse_bytes

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
_LONGEST = 3600.0


def parse_seconds(text: str) -> float:
    """Seconds of `"10us"`, `"0.3 ms"`, `"2s"` or `"0"`; any other number needs its unit.

    Raises:
      InputError: not a duration from 0 to an hour.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([a-zµμ]*)\s*", text)
    unit = _SECONDS.get(match[2]) if match else None
    if match and not match[2] and float(match[1]) == 0:
        unit = 1.0
    if match is None or unit is None or float(match[1]) * unit > _LONGEST:
        raise InputError(f"{text!r:.60} is not a duration: write for example 10us, 0.3ms or 2s")
    return float(match[1]) * unit


def parse_bandwidth(text: str) -> float:
    """Bytes a second of `"25GB/s"`, `"800 MB/s"` or `"12.5 GiB/s"`.

    Raises:
      InputError: not a positive bandwidth.
    """
    size, slash, unit = text.strip().rpartition("/")
    if slash and unit.strip() == "s":
        try:
            return float(parse_bytes(size))
        except InputError:
            pass
    raise InputError(f"{text!r:.60} is not a bandwidth: write for example 25GB/s or 800MB/s")


def format_seconds(seconds: float) -> str:
    """A duration with its unit and three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"


def format_bandwidth(bytes_per_second: float) -> str:
    """A bandwidth with a decimal unit and three significant digits."""
    return f"{format_bytes(round(bytes_per_second))}/s"
