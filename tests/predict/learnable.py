"""A made-up trace whose routing follows from token, past layers and scores, so that there is something to learn."""

import numpy as np

from ef_jax.replay.trace import RoutingTrace


def learnable(
    *,
    sequences: int = 24,
    length: int = 64,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    distances: int = 2,
    vocab: int = 16,
    seed: int = 0,
) -> RoutingTrace:
    """Every token has its experts in each layer; the pre-gate scores know one of them, two places off."""
    random = np.random.default_rng(seed)
    favourites = np.argsort(np.random.default_rng(99).random((vocab, layers, experts)))[..., :top_k]
    tokens = random.integers(0, vocab, sequences * length, np.int32)
    chosen = favourites[tokens]
    known = np.zeros((len(tokens), layers, experts))
    np.put_along_axis(known, (chosen[..., :1] + 2) % experts, 2, axis=2)
    noise = random.standard_normal((len(tokens), layers, distances, experts))
    pregate = np.zeros(noise.shape, np.float16)
    for source in range(layers):
        for distance in range(min(distances, layers - source)):
            pregate[:, source, distance] = known[:, source + distance] + 0.5 * noise[:, source, distance]
    return RoutingTrace(
        experts=chosen.astype(np.uint8),
        tokens=tokens,
        offsets=np.arange(0, len(tokens) + 1, length, dtype=np.int64),
        num_experts=experts,
        phases=np.ones(len(tokens), np.uint8),
        model="made-up",
        pregate=pregate,
    )
