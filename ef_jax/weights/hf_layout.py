"""Which Hugging Face tensors make up each of our arrays, for every family and both ways experts are stored.

Experts lie on disk one tensor each (`per_expert`, what the hub holds) or fused over a layer (`fused`, what
transformers 5 holds in memory: `gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`).
"""

import dataclasses
from collections.abc import Collection, Iterator
from types import EllipsisType
from typing import Literal

import numpy as np

from ef_jax.errors import UnsupportedError
from ef_jax.spec import ModelSpec

ExpertLayout = Literal["per_expert", "fused"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilyNames:
    """How a family names the module of its router and experts, and an expert's three matrices."""

    moe: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


FAMILY_NAMES = {
    "qwen3_moe": FamilyNames(),
    "qwen2_moe": FamilyNames(),
    "olmoe": FamilyNames(),
    "mixtral": FamilyNames(moe="block_sparse_moe", gate="w1", up="w3", down="w2"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of one Hugging Face tensor and its place in one of our arrays.

    Attributes:
      tensor: the tensor's name.
      start: first element of the run in the tensor.
      shape: of the run.
      where: index of our array that selects the run's place.
      transposed: our array holds the run's transpose there.
    """

    tensor: str
    start: int = 0
    shape: tuple[int, ...]
    where: int | slice | EllipsisType = ...
    transposed: bool = False

    def view(self, array: np.ndarray) -> np.ndarray:
        """The run's place in our `array`, shaped as the run is."""
        place = array[self.where]
        return place.T if self.transposed else place


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArraySource:
    """One of our arrays: its shape and the pieces that fill it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Layout:
    """The map between our arrays and a model's Hugging Face tensors.

    Attributes:
      spec: the model.
      experts: how the experts are stored.
      dense: our dotted name -> where that array comes from, in model order.
    """

    def __init__(self, spec: ModelSpec, experts: ExpertLayout) -> None:
        if spec.family not in FAMILY_NAMES:
            raise UnsupportedError(
                f"no tensor names are known for {spec.family!r}: known are {', '.join(FAMILY_NAMES)}"
            )
        self.spec = spec
        self.experts: ExpertLayout = experts
        # transformers 5 renames every family's module to "mlp" when it fuses the experts.
        self._names = FamilyNames() if experts == "fused" else FAMILY_NAMES[spec.family]
        self.dense = dict(_dense(spec, self._names))

    def block(self, layer: int, expert: int) -> tuple[Piece, Piece, Piece]:
        """The gate, up and down pieces of one expert block `[3, F, D]`."""
        width, hidden = self.spec.experts.width, self.spec.hidden
        base = f"model.layers.{layer}.{self._names.moe}.experts"
        size = width * hidden
        if self.experts == "fused":
            gate = up = f"{base}.gate_up_proj"
            down = f"{base}.down_proj"
            starts = (2 * expert * size, (2 * expert + 1) * size, expert * size)
        else:
            names = self._names
            gate, up, down = (f"{base}.{expert}.{name}.weight" for name in (names.gate, names.up, names.down))
            starts = (0, 0, 0)
        return (
            Piece(tensor=gate, start=starts[0], shape=(width, hidden), where=0),
            Piece(tensor=up, start=starts[1], shape=(width, hidden), where=1),
            Piece(tensor=down, start=starts[2], shape=(hidden, width), where=2, transposed=True),
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every Hugging Face tensor that the model must have, and its shape."""
        shapes = {piece.tensor: piece.shape for source in self.dense.values() for piece in source.pieces}
        count, width, hidden = self.spec.experts.count, self.spec.experts.width, self.spec.hidden
        for layer in self.spec.moe_layers:
            if self.experts == "fused":
                gate_up, _, down = self.block(layer, 0)
                shapes[gate_up.tensor] = (count, 2 * width, hidden)
                shapes[down.tensor] = (count, hidden, width)
            else:
                shapes |= {p.tensor: p.shape for expert in range(count) for p in self.block(layer, expert)}
        return shapes


def stored_experts(spec: ModelSpec, names: Collection[str]) -> ExpertLayout:
    """How the experts are stored in a checkpoint that has the tensors `names`."""
    return "fused" if f"model.layers.{spec.moe_layers[0]}.mlp.experts.gate_up_proj" in names else "per_expert"


def _dense(spec: ModelSpec, names: FamilyNames) -> Iterator[tuple[str, ArraySource]]:
    hidden = spec.hidden
    yield "embed.weight", _whole("model.embed_tokens.weight", (spec.vocab, hidden))
    for index, layer in enumerate(spec.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        yield f"{ours}.attn_norm.weight", _whole(f"{theirs}.input_layernorm.weight", (hidden,))
        yield from _attention(spec, f"{ours}.attn", f"{theirs}.self_attn")
        yield f"{ours}.ffn_norm.weight", _whole(f"{theirs}.post_attention_layernorm.weight", (hidden,))
        if layer.ffn == "dense":
            if spec.dense_width is None:
                raise UnsupportedError(f"layer {index} is dense, but the spec has no dense_width")
            yield f"{ours}.mlp.block", _packed(f"{theirs}.mlp", spec.dense_width, hidden)
            continue
        yield f"{ours}.router.weight", _whole(f"{theirs}.{names.moe}.gate.weight", (spec.experts.count, hidden))
        if spec.shared is not None:
            shared = f"{theirs}.{names.moe}.shared_expert"
            yield f"{ours}.shared.block", _packed(shared, spec.shared.width, hidden)
            if spec.shared.gated:
                yield f"{ours}.shared.gate.weight", _whole(f"{shared}_gate.weight", (1, hidden))
    yield "norm.weight", _whole("model.norm.weight", (hidden,))
    if not spec.tie_embeddings:
        yield "head.weight", _whole("lm_head.weight", (spec.vocab, hidden))


def _attention(spec: ModelSpec, ours: str, theirs: str) -> Iterator[tuple[str, ArraySource]]:
    attention = spec.attention
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    rows = {"q": queries, "k": keys, "v": keys}
    yield f"{ours}.qkv_proj.weight", _stacked(theirs, "weight", rows, (spec.hidden,))
    if attention.qkv_bias:
        yield f"{ours}.qkv_proj.bias", _stacked(theirs, "bias", rows, ())
    yield f"{ours}.o_proj.weight", _whole(f"{theirs}.o_proj.weight", (spec.hidden, queries))
    if attention.out_bias:
        yield f"{ours}.o_proj.bias", _whole(f"{theirs}.o_proj.bias", (spec.hidden,))
    if attention.qk_norm is not None:
        full = attention.qk_norm == "full"
        for name, width in (("q", queries), ("k", keys)):
            shape = (width if full else attention.head_dim,)
            yield f"{ours}.{name}_norm.weight", _whole(f"{theirs}.{name}_norm.weight", shape)


def _whole(tensor: str, shape: tuple[int, ...]) -> ArraySource:
    return ArraySource(shape=shape, pieces=(Piece(tensor=tensor, shape=shape),))


def _stacked(module: str, kind: str, rows: dict[str, int], rest: tuple[int, ...]) -> ArraySource:
    pieces = []
    end = 0
    for name, count in rows.items():
        where = slice(end, end + count)
        pieces.append(Piece(tensor=f"{module}.{name}_proj.{kind}", shape=(count, *rest), where=where))
        end += count
    return ArraySource(shape=(end, *rest), pieces=tuple(pieces))


def _packed(module: str, width: int, hidden: int) -> ArraySource:
    return ArraySource(
        shape=(3, width, hidden),
        pieces=(
            Piece(tensor=f"{module}.gate_proj.weight", shape=(width, hidden), where=0),
            Piece(tensor=f"{module}.up_proj.weight", shape=(width, hidden), where=1),
            Piece(tensor=f"{module}.down_proj.weight", shape=(hidden, width), where=2, transposed=True),
        ),
    )
