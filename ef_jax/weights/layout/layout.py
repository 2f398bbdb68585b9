"""Which Hugging Face tensors make up each of our arrays, for every family."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ef_jax.errors import UnsupportedError
from ef_jax.families import FAMILIES, ExpertLayout, TensorNames
from ef_jax.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, ModelSpec
from ef_jax.weights.layout.attention import attention_sources
from ef_jax.weights.layout.delta_net import delta_net_sources
from ef_jax.weights.layout.experts import expert_pieces
from ef_jax.weights.layout.latent_attention import latent_attention_sources
from ef_jax.weights.layout.pieces import ArraySource, Piece, packed, whole
from ef_jax.weights.layout.switch_transformers import stack_sources

_DENSE = ("gate_proj", "up_proj", "down_proj")


class Expected(NamedTuple):
    """A Hugging Face tensor that a model must have: its shape, and the dtype that we hold it in (None: the model's)."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float8_e4m3fn", "uint8"] | None = None


class Layout:
    """The map between our arrays and a model's Hugging Face tensors.

    Attributes:
      spec: the model.
      names: of its family.
      experts: how the experts are stored.
      dense: our dotted name -> where that array comes from, in model order.
    """

    def __init__(self, spec: ModelSpec, experts: ExpertLayout) -> None:
        self.spec = spec
        self.names = family_names(spec)
        self.experts: ExpertLayout = experts
        self.dense = dict(_dense(spec, self.names, self._moe))
        self._unused = [pattern.format(layers=len(spec.layers)) for pattern in self.names.unused]

    def block(self, layer: int, expert: int) -> tuple[Piece, ...]:
        """The pieces of one expert's block."""
        return expert_pieces(self.spec, self.names, self.experts, layer, expert)

    def tensors(self) -> dict[str, Expected]:
        """Every Hugging Face tensor that the model must have."""
        expected = {
            piece.tensor: Expected(piece.tensor_shape, source.dtype)
            for source in self.dense.values()
            for piece in source.pieces
        }
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.experts.count):
                pieces = self.block(layer, expert)
                expected |= {piece.tensor: Expected(piece.tensor_shape, piece.dtype) for piece in pieces}
        return expected

    def is_unused(self, tensor: str) -> bool:
        """Whether a tensor belongs to a part of the released model that is not run."""
        return any(re.fullmatch(pattern, tensor) for pattern in self._unused)

    @property
    def _moe(self) -> str:
        return self.names.fused_moe if self.experts == "fused" else self.names.moe


def family_names(spec: ModelSpec) -> TensorNames:
    """How the model's family names its tensors.

    Raises:
      UnsupportedError: nobody knows.
    """
    if spec.family not in FAMILIES:
        raise UnsupportedError(f"no tensor names are known for {spec.family!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[spec.family].names


def _dense(spec: ModelSpec, names: TensorNames, moe: str) -> Iterator[tuple[str, ArraySource]]:
    if spec.encodes:
        yield from stack_sources(spec)
        return
    hidden, model = spec.hidden, names.model
    yield "embed.weight", whole(f"{model}.embed_tokens.weight", (spec.vocab, hidden))
    for index, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{index}", f"{model}.layers.{index}"
        yield from _norm(spec, f"{ours}.attn_norm", f"{theirs}.input_layernorm")
        yield from _mixer(spec, names, layer, f"{ours}.attn", theirs)
        yield from _norm(spec, f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
        if layer.ffn == "dense":
            if spec.dense_width is None:
                raise UnsupportedError(f"layer {index} is dense, but the spec has no dense_width")
            yield f"{ours}.mlp.block", packed(f"{theirs}.{names.dense}", spec.dense_width, hidden, _DENSE)
        else:
            yield from _moe_layer(spec, names, ours, theirs, moe)
    yield from _norm(spec, "norm", f"{model}.norm")
    if not spec.tie_embeddings:
        yield "head.weight", whole(f"{names.head}.weight", (spec.vocab, hidden))
        if spec.head_bias:
            yield "head.bias", whole(f"{names.head}.bias", (spec.vocab,))


def _norm(spec: ModelSpec, ours: str, theirs: str) -> Iterator[tuple[str, ArraySource]]:
    for kind in ("weight", "bias") if spec.norm == "layer" else ("weight",):
        yield f"{ours}.{kind}", whole(f"{theirs}.{kind}", (spec.hidden,))


def _mixer(
    spec: ModelSpec, names: TensorNames, layer: LayerSpec, ours: str, theirs: str
) -> Iterator[tuple[str, ArraySource]]:
    attention = f"{theirs}.{names.attn}"
    if layer.mixer == "delta_net" and spec.delta_net is not None:
        yield from delta_net_sources(spec, spec.delta_net, ours, f"{theirs}.{names.delta_net}")
    elif isinstance(spec.attention, LatentAttentionSpec):
        yield from latent_attention_sources(spec, spec.attention, ours, attention)
    elif isinstance(spec.attention, AttentionSpec):
        yield from attention_sources(spec, spec.attention, ours, attention)


def _moe_layer(
    spec: ModelSpec, names: TensorNames, ours: str, theirs: str, moe: str
) -> Iterator[tuple[str, ArraySource]]:
    experts, router = spec.experts.count, f"{theirs}.{moe}.{names.router}"
    dtype: Literal["float32"] | None = "float32" if spec.router.weight_dtype == "float32" else None
    yield f"{ours}.router.weight", whole(f"{router}.weight", (experts, spec.hidden), dtype=dtype)
    if spec.router.bias:
        yield f"{ours}.router.bias", whole(f"{router}.bias", (experts,))
    if spec.router.select_bias:
        shape = (*names.select_bias_shape, experts)
        yield (
            f"{ours}.router.select_bias",
            whole(f"{theirs}.{names.select_bias}", (experts,), of=shape, dtype="float32"),
        )
    if spec.shared is not None:
        shared = f"{theirs}.{moe}.{names.shared}"
        yield f"{ours}.shared.block", packed(shared, spec.shared.width, spec.hidden, _DENSE)
        if spec.shared.gated:
            gate = f"{theirs}.{moe}.{names.shared_gate}.weight"
            yield f"{ours}.shared.gate.weight", whole(gate, (1, spec.hidden))
