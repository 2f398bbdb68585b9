"""Where the arrays of an encoder and a decoder lie, each in a stack of blocks (Switch Transformers)."""

from collections.abc import Iterator

from ef_jax.errors import UnsupportedError
from ef_jax.spec import ModelSpec, RelativeAttentionSpec
from ef_jax.weights.layout.pieces import TRANSPOSED, ArraySource, Piece, stacked, whole


def stack_sources(spec: ModelSpec) -> Iterator[tuple[str, ArraySource]]:
    """All our arrays but the experts'."""
    yield "embed.weight", whole("shared.weight", (spec.vocab, spec.hidden))
    for index in range(len(spec.layers)):
        yield from _layer(spec, index)
    yield "norm.weight", whole("decoder.final_layer_norm.weight", (spec.hidden,))
    yield "encoder_norm.weight", whole("encoder.final_layer_norm.weight", (spec.hidden,))


def stack_expert_pieces(spec: ModelSpec, layer: int, expert: int) -> tuple[Piece, ...]:
    """The pieces that fill one expert's block."""
    module = f"{_part(spec, layer, 'ffn')}.mlp.experts.expert_{expert}"
    return _network(module, spec.experts.width, spec.hidden)


def _layer(spec: ModelSpec, index: int) -> Iterator[tuple[str, ArraySource]]:
    layer, ours = spec.layers[index], f"layers.{index}"
    names = {"attn": "SelfAttention"} | ({"cross": "EncDecAttention"} if layer.stack == "decoder" else {})
    for part, module in names.items():
        theirs = _part(spec, index, part)
        yield f"{ours}.{part}_norm.weight", whole(f"{theirs}.layer_norm.weight", (spec.hidden,))
        yield from _attention(spec, f"{ours}.{part}", f"{theirs}.{module}", fused="qkv" if part == "attn" else "kv")
    if index in (spec.step_layers[0], spec.prompt_layers[0]):
        bias = f"{_part(spec, index, 'attn')}.SelfAttention.relative_attention_bias.weight"
        attention = _relative(spec)
        yield f"{ours}.attn.bias.weight", whole(bias, (attention.buckets, attention.heads))
    theirs = _part(spec, index, "ffn")
    yield f"{ours}.ffn_norm.weight", whole(f"{theirs}.layer_norm.weight", (spec.hidden,))
    if layer.ffn == "dense":
        if spec.dense_width is None:
            raise UnsupportedError(f"layer {index} is dense, but the spec has no dense_width")
        pieces = _network(f"{theirs}.mlp", spec.dense_width, spec.hidden)
        yield f"{ours}.mlp.block", ArraySource(shape=(2, spec.dense_width, spec.hidden), pieces=pieces)
        return
    router = f"{theirs}.mlp.router.classifier"
    yield f"{ours}.router.weight", whole(f"{router}.weight", (spec.experts.count, spec.hidden))
    if spec.router.bias:
        yield f"{ours}.router.bias", whole(f"{router}.bias", (spec.experts.count,))


def _attention(spec: ModelSpec, ours: str, theirs: str, *, fused: str) -> Iterator[tuple[str, ArraySource]]:
    width = _relative(spec).heads * _relative(spec).head_dim
    if fused == "kv":
        yield f"{ours}.q_proj.weight", whole(f"{theirs}.q.weight", (width, spec.hidden))
    tensors = {f"{theirs}.{name}.weight": width for name in fused}
    yield f"{ours}.{fused}_proj.weight", stacked(tensors, (spec.hidden,))
    yield f"{ours}.o_proj.weight", whole(f"{theirs}.o.weight", (spec.hidden, width))


def _network(module: str, width: int, hidden: int) -> tuple[Piece, ...]:
    """Up and transposed down."""
    return (
        Piece(tensor=f"{module}.wi.weight", shape=(width, hidden), where=0),
        Piece(tensor=f"{module}.wo.weight", shape=(hidden, width), where=1, axes=TRANSPOSED),
    )


def _part(spec: ModelSpec, index: int, part: str) -> str:
    """The module of a layer's attention, reader of the prompt, or network."""
    stack = spec.layers[index].stack
    first = (spec.step_layers if stack == "decoder" else spec.prompt_layers)[0]
    parts = ("attn", "cross", "ffn") if stack == "decoder" else ("attn", "ffn")
    return f"{stack}.block.{index - first}.layer.{parts.index(part)}"


def _relative(spec: ModelSpec) -> RelativeAttentionSpec:
    if not isinstance(spec.attention, RelativeAttentionSpec):
        raise UnsupportedError(f"an encoder and a decoder have relative attention, got {spec.attention}")
    return spec.attention
