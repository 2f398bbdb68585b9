"""What a compiled program takes of device memory besides its arguments."""

from typing import Any

import jax


def program_memory(compiled: jax.stages.Compiled) -> Any:
    """The executable's own `memory_analysis()`: `temp_size_in_bytes` and the sizes of arguments and outputs.

    Raises:
      RuntimeError: the backend does not say.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not say how much memory a program takes, so no plan can be made")
    return analysis


def live_bytes(device: jax.Device) -> int:
    """Bytes of the arrays in the device memory of `device`."""
    return sum(
        array.nbytes
        for array in jax.live_arrays()
        if array.sharding.memory_kind == "device" and device in array.sharding.device_set
    )
