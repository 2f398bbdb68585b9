"""The weights that stay on the device: everything but the routed experts."""

from collections.abc import Callable, Mapping

import jax

from ef_jax.nn import layer_definition, top_definition
from ef_jax.spec import ModelSpec
from ef_jax.weights import Checkpoint


class DenseWeights:
    """Device arrays as the programs take them: `top` (embedding, final norm, head) and each layer's `layers[i]`."""

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, jax.Array]) -> None:
        self.top = [arrays[path] for path in top_definition(spec)[1]]
        self.layers = [
            [arrays[f"layers.{index}.{path}"] for path in layer_definition(spec, layer.ffn)[1]]
            for index, layer in enumerate(spec.layers)
        ]

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: jax.Device, *, advance: Callable[[int], None] = lambda nbytes: None
    ) -> "DenseWeights":
        """Copy the dense arrays of a checkpoint to `device`, one by one; `advance` hears the bytes of each.

        Raises:
          CheckpointError: an array cannot be read.
        """
        sharding = jax.sharding.SingleDeviceSharding(device)
        arrays = {}
        for name, array in checkpoint.dense():
            arrays[name] = jax.device_put(array, sharding).block_until_ready()
            advance(array.nbytes)
        return cls(checkpoint.spec, arrays)
