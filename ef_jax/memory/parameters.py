"""How many parameters a model has, from its spec alone."""

import dataclasses
import math

from ef_jax.nn import dense_shapes
from ef_jax.spec import ModelSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Counts of a model's parameters, and bytes of them as they are held.

    Attributes:
      total: of the whole model.
      active: of those that one token passes through: all that are no routed experts, and top-k experts a layer. In a
        model with an encoder, of both stacks. The embedding counts whole.
      expert: of one expert; a quantized weight is one parameter, its scales are none.
      dense_bytes: of everything but the routed experts.
      expert_bytes: of all routed experts, as stored.
    """

    total: int
    active: int
    expert: int
    dense_bytes: int
    expert_bytes: int


def count_parameters(spec: ModelSpec) -> Parameters:
    """Count a model's parameters. Nothing is allocated."""
    shapes = dense_shapes(spec).values()
    dense = sum(shape.size for shape in shapes)
    matrices, width, hidden = spec.block_shape
    expert = math.prod(spec.block_shape) + ((matrices - 1) * width + hidden if spec.experts.bias else 0)
    return Parameters(
        total=dense + spec.total_experts * expert,
        active=dense + len(spec.moe_layers) * spec.experts.top_k * expert,
        expert=expert,
        dense_bytes=sum(shape.size * shape.dtype.itemsize for shape in shapes),
        expert_bytes=spec.total_experts * spec.block_bytes,
    )
