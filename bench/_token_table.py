"""What tokens use by their id alone: the routing path that costs nothing, as a stand-in for a trained one."""

import numpy as np
from jaxtyping import UInt8

from ef_jax.predict.log_odds import to_bins
from ef_jax.replay.trace import RoutingTrace

_PRIOR = 4.0  # tokens' worth of what all tokens use
_BLOCK_TOKENS = 4096


def table_bins(known: RoutingTrace, trace: RoutingTrace) -> UInt8[np.ndarray, "N L E"]:
    """Bins of how often a token of that id used each expert in `known`, with its layers' frequencies as a prior."""
    shape = (trace.layers, trace.num_experts)
    usual = np.stack([np.bincount(known.experts[:, layer].ravel(), minlength=shape[1]) for layer in range(shape[0])])
    ids, place = np.unique(known.tokens, return_inverse=True)
    counts = np.zeros((len(ids), *shape), np.float32)
    layer = np.arange(shape[0])[:, None]
    for first in range(0, known.count, _BLOCK_TOKENS):
        part = slice(first, first + _BLOCK_TOKENS)
        np.add.at(counts, (place[part, None, None], layer, known.experts[part].astype(np.intp)), 1.0)
    seen = np.bincount(place).astype(np.float32)
    chances = (counts + _PRIOR * usual / known.count) / (seen + _PRIOR)[:, None, None]
    unknown = (usual / known.count).astype(np.float32)
    table = _bins(np.concatenate([chances, unknown[None]]))
    found = np.minimum(np.searchsorted(ids, trace.tokens), len(ids) - 1)
    return table[np.where(ids[found] == trace.tokens, found, len(ids))]


def _bins(chances: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return to_bins(np.log(chances) - np.log1p(-chances), np)
