"""What the kernels make of a slot pool's arrays."""

import jax

from ef_jax.memory.slot_pool import Slots
from ef_jax.spec import ModelSpec
from pallas_kernels import ExpertBiases, QuantizedPool, from_storage


def slot_weights(spec: ModelSpec, pool: Slots) -> tuple[jax.Array | QuantizedPool, ExpertBiases | None]:
    """The weights and the biases of the blocks in `pool`; nothing is copied."""
    if not isinstance(pool, dict):
        return pool, None
    experts = spec.experts
    weights: jax.Array | QuantizedPool
    if experts.quantization is None:
        weights = pool["weights"]
    else:
        scales = {name: pool[name] for name in ("gate_up_scales", "down_scales")}
        if experts.quantization == "int4":
            scales = {name: from_storage(bits, "bfloat16") for name, bits in scales.items()}
        weights = QuantizedPool(values=pool["values"], **scales, format=experts.quantization)
    biases = None
    if experts.bias:
        names = ("gate_bias", "up_bias", "down_bias")
        biases = ExpertBiases(*(from_storage(pool[name], spec.dtype) for name in names))
    return weights, biases
