"""The compiled parts of a routing path's training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.path_data import PathBatch
from ef_jax.predict.path_loss import Dropout, Leaves, Merge, loss, measure
from ef_jax.predict.path_options import PathTrainingOptions
from ef_jax.predict.training import load_optax


class PathPrograms(NamedTuple):
    """Functions of a training; leaves are the predictor's parameters, in one order.

    Attributes:
      merged: the predictor of leaves.
      start: the first leaves and the optimizer's memory.
      step: leaves and memory after a batch, both donated; the key is of what is left out.
      measure: see `path_loss.measure`.
    """

    merged: Merge
    start: Callable[[], tuple[Leaves, Any]]
    step: Callable[[Leaves, Any, PathBatch, PRNGKeyArray], tuple[Leaves, Any]]
    measure: Callable[[Leaves, PathBatch], tuple[jax.Array, jax.Array]]


@functools.lru_cache(maxsize=4)  # a training that is resumed or repeated compiles nothing
def path_programs(spec: RoutingPathSpec, options: PathTrainingOptions, steps: int) -> PathPrograms:
    """Those of a training of `steps` steps.

    Raises:
      InputError: optax is not installed.
    """
    optax = load_optax()
    graph, shapes = nnx.split(nnx.eval_shape(lambda: RoutingPath(spec, rngs=nnx.Rngs(0))))
    structure = jax.tree.structure(shapes)

    def merged(leaves: Leaves) -> RoutingPath:
        path: RoutingPath = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        return path

    peak = options.learning_rate
    rates = optax.warmup_cosine_decay_schedule(0.1 * peak, peak, min(50, steps // 4), steps + 1, 0.02 * peak)
    matrices = [leaf.ndim > 1 for leaf in jax.tree.leaves(shapes)]
    decayed = optax.adamw(rates, b2=0.99, weight_decay=options.weight_decay, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), decayed)
    compute = options.compute or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cost = functools.partial(loss, merged, jnp.dtype(compute), Dropout(options.dropout, options.word_dropout))

    @jax.jit
    def start() -> tuple[Leaves, Any]:
        leaves = jax.tree.leaves(nnx.state(RoutingPath(spec, rngs=nnx.Rngs(random_key(options.seed)))))
        return leaves, optimizer.init(leaves)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(leaves: Leaves, memory: Any, batch: PathBatch, key: PRNGKeyArray) -> tuple[Leaves, Any]:
        changes, memory = optimizer.update(jax.grad(cost)(leaves, batch, key), memory, leaves)
        return optax.apply_updates(leaves, changes), memory

    return PathPrograms(merged, start, step, jax.jit(functools.partial(measure, merged)))


def random_key(seed: int) -> PRNGKeyArray:
    """Of a generator that takes a CPU less time to compile and run than the rest of a step."""
    return jax.random.key(seed, impl="unsafe_rbg")
