"""Small made-up traces."""

import numpy as np

from ef_jax.replay.trace import RoutingTrace


def made_up(
    *,
    sequences: int = 6,
    length: int = 40,
    layers: int = 3,
    experts: int = 16,
    top_k: int = 2,
    skew: float = 1.0,
    block_bytes: int | None = None,
    pregate: int = 0,
    seed: int = 0,
) -> RoutingTrace:
    """Tokens that draw their experts without replacement; each sequence and layer has its own favourites.

    Args:
      skew: standard deviation of the logarithms of an expert's chances; 0: uniform routing.
      pregate: distances of pre-gate scores, which are what the experts were drawn by and noise that grows with the
        distance; 0: none.
    """
    random = np.random.default_rng(seed)
    chances = skew * random.standard_normal((sequences, 1, layers, experts))
    drawn = chances + random.gumbel(size=(sequences, length, layers, experts))
    chosen = np.argsort(-drawn, axis=-1)[..., :top_k].reshape(-1, layers, top_k)
    count = sequences * length
    scores = np.zeros((count, layers, pregate, experts), np.float16)
    for source in range(layers):
        for target in range(source, min(source + pregate, layers)):
            noise = 0.5 * (target - source + 1) * random.standard_normal((count, experts))
            scores[:, source, target - source] = drawn.reshape(-1, layers, experts)[:, target] + noise
    return RoutingTrace(
        experts=chosen.astype(np.uint8),
        tokens=random.integers(0, 100, count, np.int32),
        offsets=np.arange(0, count + 1, length, dtype=np.int64),
        num_experts=experts,
        phases=np.ones(count, np.uint8),
        model="made-up",
        block_bytes=block_bytes,
        pregate=scores if pregate else None,
    )
