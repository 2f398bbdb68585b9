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
    """Bytes of the arrays in the device memory of `device`. Arrays of several devices may share their buffers with
    those of one; each buffer is then counted once."""
    on_device = [
        array
        for array in jax.live_arrays()
        if array.sharding.memory_kind == "device" and device in array.sharding.device_set
    ]
    if all(len(array.sharding.device_set) == 1 for array in on_device):
        return sum(array.nbytes for array in on_device)  # asking for buffers makes arrays of its own
    sizes: dict[object, int] = {}
    for array in on_device:
        for shard in array.addressable_shards:
            if shard.device == device:
                sizes[_buffer(shard.data)] = shard.data.nbytes
    return sum(sizes.values())


def _buffer(array: jax.Array) -> object:
    """What tells one buffer from another."""
    try:
        return array.unsafe_buffer_pointer()
    except (RuntimeError, ValueError):
        return id(array)  # an empty array or one that is being taken has none
