"""Asking whether a device is done, and waiting for it with an end to the waiting."""

import time

import jax

_YIELD_SECONDS = 2e-3  # polls only yield so long, so that a short wait ends on time
_NAP_SECONDS = 100e-6


def is_ready(array: jax.Array) -> bool:
    """Whether `array` is there, or has failed; asks without waiting."""
    return array.is_ready()  # type: ignore[attr-defined]  # missing in jax's stub


def ready_within(array: jax.Array, seconds: float) -> bool:
    """Whether `array` is there within `seconds`; returns as soon as it is.

    Raises:
      JaxRuntimeError: the copy or the program that makes it has failed.
    """
    if not is_ready(array):
        began = time.perf_counter()
        while not is_ready(array):
            waited = time.perf_counter() - began
            if waited > seconds:
                return False
            time.sleep(0 if waited < _YIELD_SECONDS else _NAP_SECONDS)
    array.block_until_ready()  # raises what went wrong
    return True
