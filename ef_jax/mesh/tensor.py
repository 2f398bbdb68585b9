"""The dense weights on a mesh."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from ef_jax.mesh.layout import MeshLayout
from ef_jax.weights import Checkpoint


def place_dense(
    checkpoint: Checkpoint, layout: MeshLayout, *, advance: Callable[[int], None] = lambda nbytes: None
) -> dict[str, jax.Array]:
    """The dense arrays of a checkpoint as global arrays, by name; `advance` hears the bytes of each as it is read.

    Every array is read once, and only this process's devices are written to.

    Raises:
      CheckpointError: an array cannot be read.
    """
    arrays = {}
    for name, array in checkpoint.dense():
        arrays[name] = _place(array, layout.everywhere)
        advance(array.nbytes)
    return arrays


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    parts = [jax.device_put(array, device) for device in sharding.addressable_devices]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(array.shape, sharding, parts))
