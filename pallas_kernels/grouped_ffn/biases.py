"""Biases of the experts in a pool, of models whose projections have them (gpt-oss)."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ExpertBiases(NamedTuple):
    """One row a slot, beside the pool's blocks; in the rows' dtype or float32, added in float32."""

    gate: Float[Array, "S F"]
    up: Float[Array, "S F"]
    down: Float[Array, "S D"]
