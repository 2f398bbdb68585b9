"""Rotary position embeddings."""

import dataclasses
from typing import Literal

from ef_jax.spec._check import require


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    `kind` is transformers' `rope_type`. Fields a kind does not use keep their defaults. `dim`: the first so many
    elements of a head are rotated, the rest pass. `interleaved`: pairs are neighbours (2i, 2i + 1), not halves apart.
    `precise`: rotated in float32 and rounded once; else cos and sin are rounded to the model's dtype first.
    `attention_factor` multiplies cos and sin (yarn, longrope); None means the kind's own formula.
    Longrope divides each frequency by its `short_factors`, or by its `long_factors` where `stretched`: for contexts
    beyond `original_max_position` (`nn.settle_rope`); `long_attention_factor` is then the attention factor if given.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "yarn", "llama3", "longrope"] = "default"
    interleaved: bool = False
    precise: bool = False
    factor: float = 1.0
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_attention_factor: float | None = None
    stretched: bool = False

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope theta must be positive, got {self.theta}")
        require(self.dim > 0 and self.dim % 2 == 0, f"rope dim must be even and positive, got {self.dim}")
        require(self.factor > 0, f"rope factor must be positive, got {self.factor}")
        if self.kind in ("yarn", "llama3", "longrope"):
            require(
                self.original_max_position is not None and self.original_max_position > 0,
                f"rope kind {self.kind!r} needs original_max_position, got {self.original_max_position}",
            )
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                count = len(getattr(self, name))
                require(count == self.dim // 2, f"rope {name} must be {self.dim // 2}, one a frequency, got {count}")
