"""Where grouped-query attention lies."""

from collections.abc import Iterator

from ef_jax.spec import AttentionSpec, ModelSpec
from ef_jax.weights.layout.pieces import ArraySource, stacked, whole


def attention_sources(
    spec: ModelSpec, attention: AttentionSpec, ours: str, theirs: str
) -> Iterator[tuple[str, ArraySource]]:
    """Our arrays below `ours`, from the module `theirs`."""
    width, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    rows = {"q": attention.query_width, "k": keys, "v": keys}
    kinds = {"weight": (spec.hidden,)} | ({"bias": ()} if attention.qkv_bias else {})
    for kind, rest in kinds.items():
        tensors = {f"{theirs}.{name}_proj.{kind}": count for name, count in rows.items()}
        yield f"{ours}.qkv_proj.{kind}", stacked(tensors, rest)
    yield f"{ours}.o_proj.weight", whole(f"{theirs}.o_proj.weight", (spec.hidden, width))
    if attention.out_bias:
        yield f"{ours}.o_proj.bias", whole(f"{theirs}.o_proj.bias", (spec.hidden,))
    if attention.sinks:
        yield f"{ours}.sinks", whole(f"{theirs}.sinks", (attention.heads,))
    if attention.qk_norm in ("head", "full"):
        full = attention.qk_norm == "full"
        for name, all_heads in (("q", width), ("k", keys)):
            shape = (all_heads if full else attention.head_dim,)
            yield f"{ours}.{name}_norm.weight", whole(f"{theirs}.{name}_norm.weight", shape)
