"""Where latent attention lies."""

from collections.abc import Iterator

from ef_jax.spec import LatentAttentionSpec, ModelSpec
from ef_jax.weights.layout.pieces import ArraySource, Piece, whole


def latent_attention_sources(
    spec: ModelSpec, attention: LatentAttentionSpec, ours: str, theirs: str
) -> Iterator[tuple[str, ArraySource]]:
    """Our arrays below `ours`, from the module `theirs`."""
    heads, rank, turned = attention.heads, attention.kv_rank, attention.rope.dim
    queries = heads * (attention.nope_dim + turned)

    def linear(name: str, module: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, ArraySource]]:
        yield f"{ours}.{name}.weight", whole(f"{theirs}.{module}.weight", (rows, columns))
        if bias:
            yield f"{ours}.{name}.bias", whole(f"{theirs}.{module}.bias", (rows,))

    if attention.query_rank is None:
        yield from linear("q_proj", "q_proj", queries, spec.hidden, False)
    else:
        yield from linear("q_down", "q_a_proj", attention.query_rank, spec.hidden, attention.bias)
        yield f"{ours}.q_norm.weight", whole(f"{theirs}.q_a_layernorm.weight", (attention.query_rank,))
        yield from linear("q_up", "q_b_proj", queries, attention.query_rank, False)
    yield from linear("kv_down", "kv_a_proj_with_mqa", rank + turned, spec.hidden, attention.bias)
    yield f"{ours}.kv_norm.weight", whole(f"{theirs}.kv_a_layernorm.weight", (rank,))
    yield from _up_projections(attention, ours, f"{theirs}.kv_b_proj.weight")
    yield from linear("o_proj", "o_proj", spec.hidden, heads * attention.value_dim, attention.bias)


def _up_projections(attention: LatentAttentionSpec, ours: str, tensor: str) -> Iterator[tuple[str, ArraySource]]:
    """One tensor has each head's rows for keys, then its rows for values."""
    heads, rank = attention.heads, attention.kv_rank
    rows = attention.nope_dim + attention.value_dim
    first = 0
    for name, count in (("k_up", attention.nope_dim), ("v_up", attention.value_dim)):
        pieces = tuple(
            Piece(
                tensor=tensor,
                start=(head * rows + first) * rank,
                shape=(count, rank),
                of=(heads * rows, rank),
                where=head,
            )
            for head in range(heads)
        )
        yield f"{ours}.{name}", ArraySource(shape=(heads, count, rank), pieces=pieces)
        first = attention.nope_dim
