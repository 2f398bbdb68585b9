"""What the parts of `bench.routing_path` share: predictors trained once, and what they say of sequences held out."""

import argparse
import functools
import sys
from typing import NamedTuple

import numpy as np

from bench._recall_data import record
from ef_jax.nn.routing_path import RoutingPath, RoutingPathSpec
from ef_jax.predict.path_bins import offline_path_bins
from ef_jax.predict.path_data import PathExamples
from ef_jax.predict.path_options import PathTrainingOptions
from ef_jax.predict.path_training import PathLook, PathTraining, train_path
from ef_jax.progress import Progress
from ef_jax.replay.trace import RoutingTrace
from ef_jax.replay.trace_file import load_trace


class Options(argparse.Namespace):
    """Options that may be a key: equal to themselves alone."""

    __hash__ = object.__hash__


class Fitted(NamedTuple):
    """A predictor, and what it was and was not shown.

    Attributes:
      learned: traces that it learned from.
      reported: sequences that nothing was learned from or selected by.
      path: the predictor.
      training: how it went.
      bins: uint8 `[N, L, E]` of `reported`.
    """

    learned: list[RoutingTrace]
    reported: RoutingTrace
    path: RoutingPath
    training: PathTraining
    bins: np.ndarray


@functools.cache
def on_trace(options: Options) -> Fitted:
    """Fitted to the first `--fit` sequences of `--trace`; the last `--report` ones are reported, without prompts."""
    trace = load_trace(options.trace)
    learned, reported = trace.select(0, options.fit), trace.select(trace.sequences - options.report)
    vocab = int(trace.tokens.max()) + 1
    return _fit(options, [learned], reported, vocab, prompt=0)


@functools.cache
def on_bundled(options: Options) -> Fitted:
    """Fitted to what the bundled model samples and the first halves of its held-out texts; second halves reported."""
    data = record(options.samples, options.seed)
    return _fit(options, [data.sampled, data.first_halves], data.second_halves, data.spec.vocab, prompt=0)


def _fit(options: Options, learned: list[RoutingTrace], reported: RoutingTrace, vocab: int, prompt: int) -> Fitted:
    like = learned[0]
    spec = RoutingPathSpec(
        layers=like.layers,
        experts=like.num_experts,
        top_k=like.top_k,
        vocab=vocab,
        d_model=options.width,
        d_ff=4 * options.width,
    )
    settings = PathTrainingOptions(epochs=options.epochs, seed=options.seed)
    bar: list[Progress] = []

    def report(done: int, steps: int, seen: PathLook) -> None:
        if not bar:
            bar.append(Progress(steps, "steps", "training", sys.stderr))
        bar[0].update(1, f"loss {seen.loss:.4f}, recall {100 * seen.recall.mean():.1f} %")

    path, training = train_path(spec, PathExamples(learned), settings, report)
    if bar:
        bar[0].__exit__(None, None, None)
    return Fitted(learned, reported, path, training, offline_path_bins(path, reported, prompt=prompt))
