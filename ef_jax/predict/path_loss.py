"""What a training of a routing path makes small, and how it is judged."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer, PRNGKeyArray

from ef_jax.nn.routing_path import UNKNOWN, RoutingPath
from ef_jax.predict.path_data import PathBatch
from ef_jax.predict.training import recall_at_k

Leaves = list[Any]  # arrays, or their shapes
Merge = Callable[[Leaves], RoutingPath]


class Dropout(NamedTuple):
    """Share of the residual stream's numbers that are left out, and of the tokens that are read as unknown ones."""

    numbers: float
    words: float


def loss(
    merged: Merge, compute: jnp.dtype, dropout: Dropout, leaves: Leaves, batch: PathBatch, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean binary cross-entropy an expert, under dropout.

    Args:
      merged: makes a predictor of leaves.
      compute: dtype of the products.
      dropout: how much is left out.
      leaves: float32.
      batch: stretches.
      key: of what is left out.
    """
    path = merged([leaf.astype(compute) for leaf in leaves])
    word_key, key = jax.random.split(key)
    calls = itertools.count()

    def drop(x: Array) -> Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, next(calls)), 1 - dropout.numbers, x.shape)
        return jnp.where(keep, x / (1 - dropout.numbers), 0).astype(x.dtype)

    prompts, lengths, tokens, experts, counted = map(jnp.asarray, batch)
    tokens = jnp.where(jax.random.bernoulli(word_key, dropout.words, tokens.shape), UNKNOWN, tokens)
    odds = path(prompts, lengths, tokens, drop)
    return (_cross_entropy(odds, _used(experts, odds)) * counted).sum() / counted.sum()


def measure(merged: Merge, leaves: Leaves, batch: PathBatch) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Cross-entropy, and recall at K by layer, summed over tokens; without dropout."""
    prompts, lengths, tokens, experts, counted = map(jnp.asarray, batch)
    odds = merged(leaves)(prompts, lengths, tokens)
    used = _used(experts, odds)
    recall = recall_at_k(odds, used, experts.shape[3]) * counted[..., None]
    return (_cross_entropy(odds, used) * counted).sum(), recall.sum(axis=(0, 1))


def _used(experts: Integer[Array, "B T L K"], odds: Float32[Array, "B T L E"]) -> Float32[Array, "B T L E"]:
    return jax.nn.one_hot(experts, odds.shape[3]).sum(axis=3)


def _cross_entropy(odds: Float32[Array, "B T L E"], used: Float32[Array, "B T L E"]) -> Float32[Array, "B T"]:
    return (jax.nn.softplus(odds) - odds * used).mean(axis=(2, 3))
