"""Training a correction on recorded routing, with optax."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from ef_jax.errors import InputError
from ef_jax.nn.correction import CommonLeaves, Correction, CorrectionSpec, SourceLeaves
from ef_jax.nn.correction_parallel import TokenInputs, correct_tokens, targets
from ef_jax.predict.training_data import Examples, aimed

LEAST_TOKENS = 256
"""Fewer teach nothing that the pre-gate scores do not say themselves."""

_EPOCHS, _LEAST_STEPS = 4.0, 400
_EVALUATED_TOKENS = 4096
_EVALUATION_ROWS = 512


class Leaves(NamedTuple):
    """All that is learned."""

    common: CommonLeaves
    sources: SourceLeaves


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """How a correction is trained.

    Attributes:
      epochs: how often training goes through the tokens, at most; None: four times, and in 400 steps at least.
      steps: the same as a number of steps; None: as `epochs` says.
      batch: tokens a step.
      learning_rate: its peak; it rises in the first steps and falls on a cosine.
      weight_decay: of AdamW.
      held_out: share of the tokens that are not learned from, whole sequences.
      evaluations: how often the held-out tokens are looked at.
      patience: training ends after as many looks without a smaller loss; what was best is kept.
      seed: of the first weights, the held-out sequences and the order of the tokens.
      without: inputs that are left out, names of `CorrectionSpec.columns`, to learn what they are worth.

    Raises:
      InputError: a value that cannot be.
    """

    epochs: float | None = None
    steps: int | None = None
    batch: int = 512
    learning_rate: float = 2e-2
    weight_decay: float = 1e-2
    held_out: float = 0.1
    evaluations: int = 20
    patience: int = 4
    seed: int = 0
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "evaluations", "patience", *(("steps",) if self.steps is not None else ())):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs is not None and not self.epochs > 0:
            raise InputError(f"epochs must be above 0, got {self.epochs}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share above 0 and below 1, got {self.held_out}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a training went. Recall is of a layer's K experts among the K most likely, by source and distance.

    Attributes:
      tokens: learned from.
      held_out_tokens: held out, of which at most 4,096 were looked at.
      steps: that were run; what they were at when it was best is kept.
      seconds: of all steps and looks, compilation included.
      loss: binary cross-entropy an expert, held-out tokens.
      recall_before: f32 `[L, H]`, of the pre-gate scores, held-out tokens; NaN past the last layer.
      recall_after: f32 `[L, H]`, of the correction, likewise.
    """

    tokens: int
    held_out_tokens: int
    steps: int
    seconds: float
    loss: float
    recall_before: Float32[np.ndarray, "L H"]
    recall_after: Float32[np.ndarray, "L H"]


Report = Callable[[int, int, "Evaluation"], None]


def train(
    spec: CorrectionSpec, examples: Examples, options: TrainingOptions, report: Report = lambda *_: None
) -> tuple[Correction, Training]:
    """A correction that has learned from recorded routing.

    The loss is binary cross-entropy between the log-odds and the experts that were used, so that they come out
    calibrated.

    Args:
      spec: sizes, which must be the traces'.
      examples: the traces.
      options: how.
      report: called after every step with the steps done, those to do at most, and the last look at the held-out
        tokens.

    Raises:
      InputError: optax is not installed, or there are too few tokens or sequences.
    """
    optax = load_optax()
    rows, held = examples.split(options.held_out, options.seed)
    if len(rows) < LEAST_TOKENS:
        raise InputError(f"{len(rows)} tokens to learn from are too few: record at least {LEAST_TOKENS}, better 20,000")
    batch = min(options.batch, len(rows))
    steps = options.steps or _steps(options.epochs, len(rows) / batch)
    held = held[:: math.ceil(len(held) / _EVALUATED_TOKENS)]
    random = np.random.default_rng(options.seed)

    correction = Correction(spec, rngs=nnx.Rngs(options.seed))
    leaves = _without(spec, Leaves(correction.common, correction.sources), options.without)
    peak = options.learning_rate
    rates = optax.warmup_cosine_decay_schedule(0.1 * peak, peak, min(50, steps // 4), steps + 1, 0.02 * peak)
    decayed = optax.adamw(rates, b2=0.99, weight_decay=options.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), decayed)
    memory = optimizer.init(leaves)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(leaves: Leaves, memory: Any, inputs: TokenInputs) -> tuple[Leaves, Any]:
        grads = jax.grad(functools.partial(_loss, spec))(leaves, inputs)
        changes, memory = optimizer.update(_without(spec, grads, options.without), memory, leaves)
        return optax.apply_updates(leaves, changes), memory

    began = time.perf_counter()
    best = seen = evaluate(spec, leaves, examples, held)
    before, waited, done = best.recall, 0, 0
    every = max(1, steps // options.evaluations)
    kept = jax.tree.map(jnp.copy, leaves)
    for done in range(1, steps + 1):
        chosen = np.sort(random.choice(rows, batch, replace=False))
        leaves, memory = step(leaves, memory, examples.inputs(chosen, spec))
        if done % every == 0 or done == steps:
            seen = evaluate(spec, leaves, examples, held)
            waited += 1
            if seen.loss < best.loss:
                best, waited, kept = seen, 0, jax.tree.map(jnp.copy, leaves)
        report(done, steps, seen)
        if waited == options.patience:
            break
    for name, leaf in (kept.common._asdict() | kept.sources._asdict()).items():
        getattr(correction, name).set_value(leaf)
    return correction, Training(
        tokens=len(rows),
        held_out_tokens=examples.count - len(rows),
        steps=done,
        seconds=time.perf_counter() - began,
        loss=best.loss,
        recall_before=before,
        recall_after=best.recall,
    )


class Evaluation(NamedTuple):
    """Binary cross-entropy an expert, and recall by source and distance (NaN past the last layer)."""

    loss: float
    recall: Float32[np.ndarray, "L H"]


def evaluate(spec: CorrectionSpec, leaves: Leaves, examples: Examples, rows: Int[np.ndarray, "M"]) -> Evaluation:
    """Loss and recall of the correction on the tokens `rows`."""
    loss, recall = 0.0, np.zeros((spec.layers, spec.distances))
    for first in range(0, len(rows), _EVALUATION_ROWS):
        part = rows[first : first + _EVALUATION_ROWS]
        part_loss, part_recall = _measure(spec, leaves, examples.inputs(part, spec))
        loss += float(part_loss) * len(part)
        recall += np.asarray(part_recall)
    recall = np.where(aimed(spec.layers, spec.distances), recall / len(rows), np.nan).astype(np.float32)
    return Evaluation(loss / len(rows), recall)


@functools.partial(jax.jit, static_argnums=0)
def _measure(spec: CorrectionSpec, leaves: Leaves, inputs: TokenInputs) -> tuple[Float[Array, ""], Float[Array, "L H"]]:
    """The loss, and recall summed over the tokens."""
    odds = correct_tokens(spec, *leaves, inputs)
    return _cross_entropy(spec, odds, inputs), recall_at_k(odds, _used(spec, inputs), spec.top_k).sum(axis=0)


def recall_at_k(scores: Float[Array, "*rows E"], used: Float[Array, "*rows E"], top_k: int) -> Float[Array, "*rows"]:
    """The share of the K experts used that is among the K of the highest scores."""
    best = jax.lax.top_k(scores, top_k)[1]
    return jnp.take_along_axis(used, best, axis=-1).sum(axis=-1) / top_k


def _loss(spec: CorrectionSpec, leaves: Leaves, inputs: TokenInputs) -> Float[Array, ""]:
    return _cross_entropy(spec, correct_tokens(spec, *leaves, inputs), inputs)


def _cross_entropy(spec: CorrectionSpec, odds: Float32[Array, "M L H E"], inputs: TokenInputs) -> Float[Array, ""]:
    """Mean over all experts that are predicted."""
    counts = aimed(spec.layers, spec.distances)
    losses = jax.nn.softplus(odds) - odds * _used(spec, inputs)
    return (losses.mean(axis=(0, 3)) * counts).sum() / counts.sum()


def _used(spec: CorrectionSpec, inputs: TokenInputs) -> Float32[Array, "M L H E"]:
    return targets(inputs.experts, spec.experts, spec.distances)


def _without(spec: CorrectionSpec, leaves: Leaves, names: tuple[str, ...]) -> Leaves:
    """Zeros for the weights, or gradients, of inputs that are left out."""
    sources = leaves.sources
    for name in names:
        sources = sources._replace(enter=sources.enter.at[:, :, spec.columns[name]].set(0))
    if "history" in names:
        sources = sources._replace(history_scale=jnp.zeros_like(sources.history_scale))
    return Leaves(leaves.common, sources)


def _steps(epochs: float | None, steps_an_epoch: float) -> int:
    least = _LEAST_STEPS if epochs is None else 1
    return max(least, math.ceil((epochs or _EPOCHS) * steps_an_epoch))


def load_optax() -> Any:
    """The module optax.

    Raises:
      InputError: it is not installed.
    """
    try:
        import optax
    except ImportError:
        raise InputError('training needs optax: pip install "ef_jax[train]"') from None
    return optax
