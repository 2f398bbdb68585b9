"""A whole model, layer by layer."""

import dataclasses
from typing import Any, Literal

from ef_jax.errors import UnsupportedError
from ef_jax.spec._check import from_plain, require
from ef_jax.spec.block_format import BlockFormat, block_format
from ef_jax.spec.experts import ExpertSpec, SharedExpertSpec
from ef_jax.spec.mixers import AttentionSpec, DeltaNetSpec, LatentAttentionSpec, RelativeAttentionSpec
from ef_jax.spec.router import RouterSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One layer.

    Attributes:
      ffn: routed experts or a dense feed-forward network.
      stack: the decoder, or the encoder of a model that has one.
      mixer: the model's attention, or its linear recurrence (`ModelSpec.delta_net`).
      window: a token sees so many positions up to its own; None: all.
      chunk: a token sees the positions of its own aligned run of so many, up to its own; None: all.
      rope: whether queries and keys are rotated.
    """

    ffn: Literal["moe", "dense"]
    stack: Literal["decoder", "encoder"] = "decoder"
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
    """An MoE language model: a decoder, or a decoder that reads what an encoder makes of the prompt.

    Attributes:
      layers: the decoder's, then the encoder's, if there is one.
      decoder_start: the token that a decoder with an encoder begins with; None: there is no encoder.
      norm: "rms" rounds to the model's dtype before it multiplies by the weight, "rms_f32" after; "rms_offset"
        multiplies by 1 + weight, in float32; "layer" is LayerNorm, with a bias.
      embed_scale: factor on token embeddings.
      residual_scale: factor on what attention and the feed-forward part add to the residual stream.
      logits_divisor: the logits are divided by it.
      head_bias: the output head has a bias.
      tensor_shares: devices that share the dense part. With more than one, the heads of `attention`, unless that is
        relative, `dense_width` and the width of `shared` are those of one device; all else is the whole model's.
    """

    family: str
    vocab: int
    hidden: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    layers: tuple[LayerSpec, ...]
    attention: AttentionSpec | LatentAttentionSpec | RelativeAttentionSpec
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
    decoder_start: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tensor_shares: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "max_position", "embed_scale", "residual_scale", "logits_divisor"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(self.tensor_shares > 0, f"tensor_shares must be positive, got {self.tensor_shares}")
        require(bool(self.moe_layers), "the model has no MoE layer: there are no experts to keep in host memory")
        if any(layer.ffn == "dense" for layer in self.layers):
            require(
                self.dense_width is not None and self.dense_width > 0,
                f"dense layers need a positive dense_width, got {self.dense_width}",
            )
        if any(layer.mixer == "delta_net" for layer in self.layers):
            require(self.delta_net is not None, "layers with a delta net need a delta_net, got None")
        if self.experts.quantization == "mxfp4":
            width, hidden = self.experts.width, self.hidden
            require(width % 32 == 0, f"mxfp4 experts must have a multiple of 32 as width, got {width}")
            require(hidden % 64 == 0, f"mxfp4 experts must have a multiple of 64 as hidden size, got {hidden}")
        if (group := self.experts.group) is not None:
            width, hidden = self.experts.width, self.hidden
            require(
                group > 0 and width % group == 0 and hidden % (2 * group) == 0,
                f"int4 groups of {group} must divide the expert width {width} and half of the hidden size {hidden}",
            )

        if self.decoder_start is not None or any(layer.stack == "encoder" for layer in self.layers):
            self._check_encoder()

    def _check_encoder(self) -> None:
        """What must hold of a decoder with an encoder."""
        start, decoder, encoder = self.decoder_start, self.step_layers, self.prompt_layers
        require(
            start is not None and 0 <= start < self.vocab,
            f"a decoder with an encoder begins with a token of its vocabulary, got {start}",
        )
        require(
            bool(decoder) and bool(encoder) and decoder[-1] < encoder[0],
            "a model with an encoder has decoder layers and then encoder layers",
        )
        require(bool(self.step_moe_layers), "the decoder has no MoE layer")
        require(self.tie_embeddings, "tie_embeddings must be true: an encoder and a decoder have one embedding")
        require(
            isinstance(self.attention, RelativeAttentionSpec),
            "a decoder with an encoder must have relative attention",
        )
        require(
            self.dtype != "float16",
            "a decoder with an encoder is not run in float16, whose range it was not trained for: use bfloat16",
        )

    @property
    def head_shares(self) -> int:
        """Devices that share the vocabulary of the head: all of them, or one, which has it all."""
        return 1 if self.tie_embeddings or self.vocab % self.tensor_shares else self.tensor_shares

    @property
    def encodes(self) -> bool:
        """Whether there is an encoder."""
        return self.decoder_start is not None

    @property
    def step_layers(self) -> tuple[int, ...]:
        """Indices of the layers that a decode step runs, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.stack == "decoder")

    @property
    def prompt_layers(self) -> tuple[int, ...]:
        """Indices of the layers that a prompt runs through, in order: the encoder's, where there is one."""
        stack = "encoder" if self.encodes else "decoder"
        return tuple(i for i, layer in enumerate(self.layers) if layer.stack == stack)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts, in order."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.ffn == "moe")

    @property
    def step_moe_layers(self) -> tuple[int, ...]:
        """Those of them that a decode step runs: the first ones."""
        return tuple(i for i in self.moe_layers if self.layers[i].stack == "decoder")

    @property
    def total_experts(self) -> int:
        """Expert blocks of the whole model: MoE layers x E."""
        return len(self.moe_layers) * self.experts.count

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Shape of one expert's packed weights: gate (where there is one), up, transposed down."""
        return (3 if self.experts.gated else 2, self.experts.width, self.hidden)

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def block_format(self) -> BlockFormat:
        """What one expert block is made of, as stored."""
        experts = self.experts
        return block_format(
            self.block_shape, self.dtype, quantization=experts.quantization, group=experts.group, bias=experts.bias
        )

    @property
    def block_dtype(self) -> str:
        """What the weights of a block are stored as, for reports: the dtype, or "int4:32" where a group is needed."""
        experts = self.experts
        name = experts.quantization or self.dtype
        return name if experts.group is None else f"{name}:{experts.group}"

    @property
    def block_bytes(self) -> int:
        """Bytes of one expert block, as stored."""
        return self.block_format.nbytes

    @property
    def rounded_to(self) -> str | None:
        """`block_dtype` where we rounded the released weights to it; None: the experts are as released."""
        return self.block_dtype if self.experts.quantization in ("int8", "int4") else None

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
