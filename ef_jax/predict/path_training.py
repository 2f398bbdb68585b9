"""Training a routing path on recorded routing, with optax."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from ef_jax.errors import InputError
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.path_checkpoint import load_checkpoint, save_checkpoint
from ef_jax.predict.path_data import PathBatch, PathExamples, Stretch
from ef_jax.predict.path_loss import Leaves
from ef_jax.predict.path_options import PathTrainingOptions
from ef_jax.predict.path_programs import path_programs, random_key
from ef_jax.predict.training import load_optax

LEAST_TOKENS = 256
"""Fewer teach nothing that the frequencies of the experts do not say."""

_EPOCHS, _LEAST_STEPS = 12.0, 400
_EVALUATED_STRETCHES, _EVALUATION_ROWS = 64, 4
_EVALUATION_TOKENS = 256


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
    load_optax()
    learned, held = examples.split(options.held_out, options.seed)
    tokens = examples.tokens(learned)
    if tokens < LEAST_TOKENS:
        raise InputError(f"{tokens} tokens to learn from are too few: record at least {LEAST_TOKENS}, better 100,000")
    batches = _Batches(spec, examples, learned, options)
    steps = options.steps or batches.steps()
    programs = path_programs(spec, options, steps)
    looked_at = examples.stretches(held, most=_EVALUATION_TOKENS, prompt=spec.most_prompt)[:_EVALUATED_STRETCHES]

    def look(leaves: Leaves) -> PathLook:
        parts = examples.batches(looked_at, rows=_EVALUATION_ROWS, most=_EVALUATION_TOKENS, prompt=spec.most_prompt)
        sums = [programs.measure(leaves, batch) for batch in parts]
        count = sum(end - begin for _, _, begin, end in looked_at)
        recall = np.sum([np.asarray(part, np.float64) for _, part in sums], axis=0) / count
        return PathLook(sum(float(part) for part, _ in sums) / count, recall.astype(np.float32))

    began = time.perf_counter()
    identity = f"{spec} {options} {examples.checksum()}"  # of trainings that go the same way
    if resume and checkpoint is not None:
        abstract = jax.eval_shape(programs.start)
        leaves, kept, memory, best, waited, done = _resume(checkpoint, (abstract[0], *abstract), identity)
    else:
        leaves, memory = programs.start()
        kept, best, waited, done = _copied(leaves), look(leaves), 0, 0
    seen = best
    key = random_key(options.seed)
    every = max(1, steps // options.evaluations)
    while done < steps and waited < options.patience:
        batch = batches.at(done)
        leaves, memory = programs.step(leaves, memory, batch, jax.random.fold_in(key, done))
        done += 1
        if done % every == 0 or done == steps:
            seen = look(leaves)
            waited += 1
            if seen.loss < best.loss:
                best, waited, kept = seen, 0, _copied(leaves)
            if checkpoint is not None:
                head = {"identity": identity, "loss": best.loss, "recall": best.recall.tolist()}
                save_checkpoint(checkpoint, (leaves, kept, memory), head | {"waited": waited, "done": done})
        report(done, steps, seen)
    return programs.merged(jax.device_put(kept)), PathTraining(
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


def _copied(leaves: Leaves) -> Leaves:
    """Copies on the host, that outlive the arrays."""
    return [np.array(leaf) for leaf in leaves]
