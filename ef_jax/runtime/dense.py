"""The weights that stay on the device: everything but the routed experts."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from ef_jax.nn import finish_paths, layer_definition, leaf_names, top_definition
from ef_jax.spec import ModelSpec
from ef_jax.weights import Checkpoint


class DenseWeights:
    """Device arrays as the programs take them.

    Attributes:
      top: embedding, final norm and head.
      layers: each layer's leaves.
      finish: the leaves that finish each layer after its experts; none for a dense layer.
    """

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, jax.Array]) -> None:
        self.top = [arrays[path] for path in top_definition(spec)[1]]
        self.layers = [[arrays[name] for name in leaf_names(spec, index)] for index in range(len(spec.layers))]
        self.finish = [
            [arrays[f"layers.{index}.{path}"] for path in (finish_paths(spec) if layer.ffn == "moe" else ())]
            for index, layer in enumerate(spec.layers)
        ]

    def routers(self, spec: ModelSpec) -> Iterator[tuple[str, np.ndarray]]:
        """Names and weights of the MoE layers' routers, copied to the host."""
        for layer in spec.moe_layers:
            place = layer_definition(spec, spec.layers[layer])[1].index("router.weight")
            yield f"layers.{layer}.router.weight", np.asarray(self.layers[layer][place])

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
