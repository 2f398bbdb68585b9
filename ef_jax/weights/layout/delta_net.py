"""Where gated DeltaNet lies."""

from collections.abc import Iterator

from ef_jax.spec import DeltaNetSpec, ModelSpec
from ef_jax.weights.layout.pieces import ArraySource, Piece, stacked, whole


def delta_net_sources(spec: ModelSpec, net: DeltaNetSpec, ours: str, theirs: str) -> Iterator[tuple[str, ArraySource]]:
    """Our arrays below `ours`, from the module `theirs`."""
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
    if net.fused:
        source = _by_key_head(net, theirs, spec.hidden)
    else:
        rows = {"qkv": 2 * keys + values, "z": values, "b": net.value_heads, "a": net.value_heads}
        source = stacked({f"{theirs}.in_proj_{name}.weight": count for name, count in rows.items()}, (spec.hidden,))
    yield f"{ours}.in_proj.weight", source
    yield f"{ours}.conv", whole(f"{theirs}.conv1d.weight", (net.conv_channels, 1, net.conv_width))
    for name, theirs_name in (("a_log", "A_log"), ("dt_bias", "dt_bias")):
        yield f"{ours}.{name}", whole(f"{theirs}.{theirs_name}", (net.value_heads,), dtype="float32")
    yield f"{ours}.norm", whole(f"{theirs}.norm.weight", (net.value_dim,), dtype="float32")
    yield f"{ours}.out_proj.weight", whole(f"{theirs}.out_proj.weight", (spec.hidden, values))


def _by_key_head(net: DeltaNetSpec, theirs: str, hidden: int) -> ArraySource:
    """Rows that lie key head by key head: queries, keys, values, gates; and rates, decays in a tensor of their own."""
    group = net.value_heads // net.key_heads
    run = group * net.value_dim
    tensors = {"in_proj_qkvz": (net.key_dim, net.key_dim, run, run), "in_proj_ba": (group, group)}
    pieces, end = [], 0
    for name, parts in tensors.items():
        before = 0
        for rows in parts:
            for head in range(net.key_heads):
                pieces.append(
                    Piece(
                        tensor=f"{theirs}.{name}.weight",
                        start=(head * sum(parts) + before) * hidden,
                        shape=(rows, hidden),
                        of=(net.key_heads * sum(parts), hidden),
                        where=slice(end, end + rows),
                    )
                )
                end += rows
            before += rows
    return ArraySource(shape=(end, hidden), pieces=tuple(pieces))
