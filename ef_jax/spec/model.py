"""A whole model, layer by layer."""

import dataclasses
import math
from typing import Any, Literal

from ef_jax.errors import UnsupportedError
from ef_jax.spec._check import from_plain, require
from ef_jax.spec.experts import ExpertSpec, SharedExpertSpec
from ef_jax.spec.mixers import AttentionSpec, DeltaNetSpec, LatentAttentionSpec
from ef_jax.spec.router import RouterSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
      ffn: routed experts or a dense feed-forward network.
      mixer: the model's attention, or its linear recurrence (`ModelSpec.delta_net`).
      window: a token sees so many positions up to its own; None: all.
      chunk: a token sees the positions of its own aligned run of so many, up to its own; None: all.
      rope: whether queries and keys are rotated.
    """

    ffn: Literal["moe", "dense"]
    mixer: Literal["attention", "delta_net"] = "attention"
    window: int | None = None
    chunk: int | None = None
    rope: bool = True

    def __post_init__(self) -> None:
        require(self.window is None or self.window > 0, f"sliding window must be positive, got {self.window}")
        require(self.chunk is None or self.chunk > 0, f"attention chunk must be positive, got {self.chunk}")

    @property
    def kind(self) -> "LayerSpec":
        """What decides the layer's structure and compiled programs: all but how far a token sees."""
        return dataclasses.replace(self, window=None, chunk=None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only MoE language model.

    Attributes:
      norm: "rms" rounds to the model's dtype before it multiplies by the weight, "rms_f32" after; "rms_offset"
        multiplies by 1 + weight, in float32; "layer" is LayerNorm, with a bias.
      embed_scale: factor on token embeddings.
      residual_scale: factor on what attention and the feed-forward part add to the residual stream.
      logits_divisor: the logits are divided by it.
      head_bias: the output head has a bias.
    """

    family: str
    vocab: int
    hidden: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    layers: tuple[LayerSpec, ...]
    attention: AttentionSpec | LatentAttentionSpec
    router: RouterSpec
    experts: ExpertSpec
    shared: SharedExpertSpec | None = None
    dense_width: int | None = None
    delta_net: DeltaNetSpec | None = None
    norm: Literal["rms", "rms_f32", "rms_offset", "layer"] = "rms"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    head_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "max_position", "embed_scale", "residual_scale", "logits_divisor"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(bool(self.moe_layers), "the model has no MoE layer: there are no experts to keep in host memory")
        if any(layer.ffn == "dense" for layer in self.layers):
            require(
                self.dense_width is not None and self.dense_width > 0,
                f"dense layers need a positive dense_width, got {self.dense_width}",
            )
        if any(layer.mixer == "delta_net" for layer in self.layers):
            require(self.delta_net is not None, "layers with a delta net need a delta_net, got None")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have routed experts, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.ffn == "moe")

    @property
    def total_experts(self) -> int:
        """Expert blocks of the whole model: MoE layers x E."""
        return len(self.moe_layers) * self.experts.count

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of one packed expert block: gate, up, transposed down."""
        return (3, self.experts.width, self.hidden)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one expert block."""
        return math.prod(self.block_shape) * self.itemsize

    def as_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelSpec":
        """Rebuild a spec from `as_dict` (after a trip through JSON).

        Raises:
          UnsupportedError: an unknown or missing field, or a value that the specs refuse.
        """
        try:
            spec: ModelSpec = from_plain(cls, data)
        except (KeyError, TypeError) as error:
            raise UnsupportedError(f"not a model spec of this version: {error}") from None
        return spec
