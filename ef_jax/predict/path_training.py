"""Training a routing path on recorded routing, with optax."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from ef_jax.errors import InputError
from ef_jax.nn.routing_path import UNKNOWN, RoutingPath, RoutingPathSpec
from ef_jax.predict.path_checkpoint import load_checkpoint, save_checkpoint
from ef_jax.predict.path_data import PathBatch, PathExamples, Stretch
from ef_jax.predict.training import load_optax, recall_at_k

LEAST_TOKENS = 256
"""Fewer teach nothing that the frequencies of the experts do not say."""

_EPOCHS, _LEAST_STEPS = 12.0, 400
_EVALUATED_STRETCHES, _EVALUATION_ROWS = 64, 4
_EVALUATION_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PathTrainingOptions:
    """How a routing path is trained.

    Attributes:
      epochs: how often training goes through the tokens, at most; None: 12 times, and in 400 steps at least.
      steps: the same as a number of steps; None: as `epochs` says.
      rows: stretches a step.
      stretch: tokens of a stretch, at most.
      learning_rate: its peak; it rises in the first steps and falls on a cosine.
      weight_decay: of AdamW, on matrices.
      dropout: share of the residual stream's numbers that are left out.
      word_dropout: share of the tokens that are read as unknown ones.
      compute: dtype of products; weights and their changes are float32. None: bfloat16 on an accelerator, float32 on a
        CPU, where bfloat16 is slower.
      held_out: share of the tokens that are not learned from, whole sequences.
      evaluations: how often held-out tokens are looked at, and a checkpoint is written.
      patience: training ends after as many looks without a smaller loss; what was best is kept.
      seed: of the first weights, the held-out sequences and all that is left to chance.

    Raises:
      InputError: a value that cannot be.
    """

    epochs: float | None = None
    steps: int | None = None
    rows: int = 8
    stretch: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    dropout: float = 0.2
    word_dropout: float = 0.15
    compute: str | None = None
    held_out: float = 0.1
    evaluations: int = 12
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "stretch", "evaluations", "patience", *(("steps",) if self.steps is not None else ())):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs is not None and not self.epochs > 0:
            raise InputError(f"epochs must be above 0, got {self.epochs}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share above 0 and below 1, got {self.held_out}")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a share from 0 to below 1, got {getattr(self, name)}")
        if self.compute not in (None, "bfloat16", "float32"):
            raise InputError(f"compute must be bfloat16 or float32, got {self.compute!r}")


class PathLook(NamedTuple):
    """A look at held-out tokens: binary cross-entropy an expert, and recall at K by layer."""

    loss: float
    recall: Float32[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PathTraining:
    """How a training went.

    Attributes:
      tokens: learned from.
      held_out_tokens: held out.
      steps: that were run; what they were at when it was best is kept.
      seconds: of the steps and looks of this run, compilation included.
      loss: binary cross-entropy an expert, held-out tokens.
      recall: at K, by layer, held-out tokens.
    """

    tokens: int
    held_out_tokens: int
    steps: int
    seconds: float
    loss: float
    recall: Float32[np.ndarray, " L"]


Report = Callable[[int, int, PathLook], None]
Leaves = list[Any]  # arrays, or their shapes
Merge = Callable[[Leaves], RoutingPath]


def train_path(
    spec: RoutingPathSpec,
    examples: PathExamples,
    options: PathTrainingOptions,
    report: Report = lambda *_: None,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> tuple[RoutingPath, PathTraining]:
    """A routing path that has learned from recorded routing.

    The loss is binary cross-entropy between the log-odds and the experts that were used, so that they come out
    calibrated. Half of the stretches are decoded after what was before them, half after nothing.

    Args:
      spec: sizes, which must be the traces'.
      examples: the traces.
      options: how.
      report: called after every step with the steps done, those to do at most, and the last look at held-out tokens.
      checkpoint: a file for what a later run needs to go on, written at every look; None writes none.
      resume: go on from `checkpoint`, which must be there; the result is that of a run that was never interrupted.

    Raises:
      InputError: optax is not installed, there are too few tokens or sequences, or the checkpoint is of another
        training, damaged or missing.
    """
    optax = load_optax()
    learned, held = examples.split(options.held_out, options.seed)
    tokens = examples.tokens(learned)
    if tokens < LEAST_TOKENS:
        raise InputError(f"{tokens} tokens to learn from are too few: record at least {LEAST_TOKENS}, better 100,000")
    batches = _Batches(spec, examples, learned, options)
    steps = options.steps or batches.steps()
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
    loss = functools.partial(_loss, merged, jnp.dtype(compute), options)
    measure = jax.jit(functools.partial(_measure, merged))

    @jax.jit
    def start() -> tuple[Leaves, Any]:
        leaves = jax.tree.leaves(nnx.state(RoutingPath(spec, rngs=nnx.Rngs(_key(options.seed)))))
        return leaves, optimizer.init(leaves)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(leaves: Leaves, memory: Any, batch: PathBatch, key: PRNGKeyArray) -> tuple[Leaves, Any]:
        changes, memory = optimizer.update(jax.grad(loss)(leaves, batch, key), memory, leaves)
        return optax.apply_updates(leaves, changes), memory

    looked_at = examples.stretches(held, most=_EVALUATION_TOKENS, prompt=spec.most_prompt)[:_EVALUATED_STRETCHES]

    def look(leaves: Leaves) -> PathLook:
        parts = examples.batches(looked_at, rows=_EVALUATION_ROWS, most=_EVALUATION_TOKENS, prompt=spec.most_prompt)
        sums = [measure(leaves, batch) for batch in parts]
        count = sum(end - begin for _, _, begin, end in looked_at)
        recall = np.sum([np.asarray(part, np.float64) for _, part in sums], axis=0) / count
        return PathLook(sum(float(part) for part, _ in sums) / count, recall.astype(np.float32))

    began = time.perf_counter()
    identity = f"{spec} {options} {examples.checksum()}"  # of trainings that go the same way
    if resume and checkpoint is not None:
        abstract = jax.eval_shape(start)
        leaves, kept, memory, best, waited, done = _resume(checkpoint, (abstract[0], *abstract), identity)
    else:
        leaves, memory = start()
        kept, best, waited, done = jax.device_get(leaves), look(leaves), 0, 0
    seen = best
    key = _key(options.seed)
    every = max(1, steps // options.evaluations)
    while done < steps and waited < options.patience:
        batch = batches.at(done)
        leaves, memory = step(leaves, memory, batch, jax.random.fold_in(key, done))
        done += 1
        if done % every == 0 or done == steps:
            seen = look(leaves)
            waited += 1
            if seen.loss < best.loss:
                best, waited, kept = seen, 0, jax.device_get(leaves)
            if checkpoint is not None:
                head = {"identity": identity, "loss": best.loss, "recall": best.recall.tolist()}
                save_checkpoint(checkpoint, (leaves, kept, memory), head | {"waited": waited, "done": done})
        report(done, steps, seen)
    return merged(jax.device_put(kept)), PathTraining(
        tokens=tokens,
        held_out_tokens=examples.count - tokens,
        steps=done,
        seconds=time.perf_counter() - began,
        loss=best.loss,
        recall=best.recall,
    )


class _Progress(NamedTuple):
    """Where a training stands."""

    leaves: Leaves
    kept: Leaves
    memory: Any
    best: PathLook
    waited: int
    done: int


class _Batches:
    """The batch of each step, the same in every run of a seed."""

    def __init__(
        self, spec: RoutingPathSpec, examples: PathExamples, learned: list[int], options: PathTrainingOptions
    ) -> None:
        self._spec, self._examples, self._learned, self._options = spec, examples, learned, options
        self._ends = [0]  # steps after which epochs end
        self._running: Iterator[PathBatch] = iter(())
        self._next = -1

    def steps(self) -> int:
        """How many the options ask for."""
        epochs = self._options.epochs
        least = _LEAST_STEPS if epochs is None else 1
        return max(least, math.ceil((epochs or _EPOCHS) * len(self._stretches(0)) / self._options.rows))

    def at(self, step: int) -> PathBatch:
        """The batch of a step, quickly if it is the one after the last that was asked for."""
        if step != self._next or step == self._ends[-1]:
            while self._ends[-1] <= step:
                self._ends.append(
                    self._ends[-1] + math.ceil(len(self._stretches(len(self._ends) - 1)) / self._options.rows)
                )
            rows = self._options.rows
            stretches = self._stretches(len(self._ends) - 2)[(step - self._ends[-2]) * rows :]
            self._running = self._examples.batches(
                stretches, rows=rows, most=self._options.stretch, prompt=self._spec.most_prompt
            )
        self._next = step + 1
        return next(self._running)

    def _stretches(self, epoch: int) -> list[Stretch]:
        random = np.random.default_rng([self._options.seed, epoch])
        return self._examples.stretches(
            self._learned, most=self._options.stretch, prompt=self._spec.most_prompt, random=random
        )


def _resume(checkpoint: Path, shapes: tuple[Leaves, Leaves, Any], identity: str) -> _Progress:
    if not checkpoint.is_file():
        raise InputError(f"there is no checkpoint {str(checkpoint)!r:.200} to resume from: train without --resume")
    (leaves, kept, memory), head = load_checkpoint(checkpoint, shapes)
    if head.get("identity") != identity:
        raise InputError(
            f"checkpoint {str(checkpoint)!r:.200} is of other traces or options: give those, or train without --resume"
        )
    best = PathLook(float(head["loss"]), np.array(head["recall"], np.float32))
    return _Progress(leaves, kept, memory, best, int(head["waited"]), int(head["done"]))


def _key(seed: int) -> PRNGKeyArray:
    """Of a generator that takes a CPU less time to compile and run than the rest of a step."""
    return jax.random.key(seed, impl="unsafe_rbg")


def _loss(
    merged: Merge, compute: jnp.dtype, options: PathTrainingOptions, leaves: Leaves, batch: PathBatch, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean binary cross-entropy an expert, under dropout."""
    path = merged([leaf.astype(compute) for leaf in leaves])
    word_key, key = jax.random.split(key)
    calls = itertools.count()

    def drop(x: Array) -> Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, next(calls)), 1 - options.dropout, x.shape)
        return jnp.where(keep, x / (1 - options.dropout), 0).astype(x.dtype)

    forgotten = jax.random.bernoulli(word_key, options.word_dropout, batch.tokens.shape)
    tokens = jnp.where(forgotten, UNKNOWN, batch.tokens)
    odds = path(batch.prompts, batch.lengths, tokens, drop)
    return (_cross_entropy(odds, _used(batch, odds)) * batch.counted).sum() / batch.counted.sum()


def _measure(merged: Merge, leaves: Leaves, batch: PathBatch) -> tuple[Float[Array, ""], Float[Array, " L"]]:
    """Cross-entropy, and recall at K by layer, summed over tokens."""
    odds = merged(leaves)(batch.prompts, batch.lengths, batch.tokens)
    used = _used(batch, odds)
    recall = recall_at_k(odds, used, batch.experts.shape[3]) * batch.counted[..., None]
    return (_cross_entropy(odds, used) * batch.counted).sum(), recall.sum(axis=(0, 1))


def _used(batch: PathBatch, odds: Float32[Array, "B T L E"]) -> Float32[Array, "B T L E"]:
    return jax.nn.one_hot(batch.experts, odds.shape[3]).sum(axis=3)


def _cross_entropy(odds: Float32[Array, "B T L E"], used: Float32[Array, "B T L E"]) -> Float32[Array, "B T"]:
    return (jax.nn.softplus(odds) - odds * used).mean(axis=(2, 3))
