"""Part "need" of `bench.horizon`: estimates of how many distinct experts the layers of a step use, before it runs.

The sequences of a trace go on side by side, and from step to step another number of them, 1 to 8 at random, takes part:
what requests that come and go do to a batch. Every estimate of `ef_jax.schedule.need` hears the batch size and, with
the bundled model's trace, the diversity of its token embeddings; then what the layers used. Its error is the mean of
|estimate - uses| over layers and steps, in % of the mean uses. "within" is the same among steps of one batch size,
where only diversity tells steps apart: the estimates are made anew for each size.

Where the trace has pre-gate scores, N_e one layer ahead is compared with the uses too, for one sequence at a time: the
count of the likeliest experts that together have 90 % of the probability (ExpertFlow-S), the rounded sum of the
probabilities, and K, which every token uses.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench._report import rounded, table
from ef_jax.predict import Pregate
from ef_jax.replay.pregate_bins import PregateBins
from ef_jax.replay.trace import RoutingTrace
from ef_jax.schedule.nearest_first import cumulative, top_k
from ef_jax.schedule.need import NEEDS, Need, make_need

_MOST = 8
_STEPS, _SETTLE = 1500, 200
_PREGATE_STEPS = 400


class _Step(NamedTuple):
    batch: int
    diversity: float | None
    used: list[int]  # distinct experts, by layer


def run(trace: RoutingTrace) -> dict[str, Any]:
    """Errors of every estimate."""
    embeddings = _embeddings(trace)
    steps = list(_steps(trace, embeddings))
    errors = {name: {"mixed": _error(steps, name), "within": _within(steps, name)} for name in NEEDS}
    print("error of estimates of the experts that a layer uses, in %, batches of 1 to 8 sequences")
    shown = [(name, *(f"{100 * error[kind]:.2f}" for kind in ("mixed", "within"))) for name, error in errors.items()]
    print(table(["estimate", "mixed sizes", "within a size"], shown), end="\n\n")
    result: dict[str, Any] = {"diversity": embeddings is not None, "steps": len(steps), "error": errors}
    if trace.pregate is not None:
        result["counts"] = _counts(trace)
        shown = [(name, f"{row['mean']:.2f}", f"{row['error']:.2f}") for name, row in result["counts"].items()]
        print(f"N_e one layer ahead, where a token uses {trace.top_k} experts")
        print(table(["estimate", "mean", "mean |error|"], shown), end="\n\n")
    return result


def _steps(trace: RoutingTrace, embeddings: np.ndarray | None) -> Iterator[_Step]:
    random = np.random.default_rng(0)
    places = trace.offsets[:-1].copy()
    for _ in range(_STEPS):
        open_ = np.flatnonzero(places < trace.offsets[1:])
        if len(open_) < _MOST:
            places = trace.offsets[:-1].copy()
            open_ = np.arange(trace.sequences)
        active = random.choice(open_, min(int(random.integers(1, _MOST + 1)), len(open_)), replace=False)
        rows = places[active]
        places[active] += 1
        used = [len(np.unique(trace.experts[rows, layer])) for layer in range(trace.layers)]
        yield _Step(len(rows), None if embeddings is None else _diversity(embeddings[trace.tokens[rows]]), used)


def _diversity(vectors: np.ndarray) -> float:
    total = vectors.sum(axis=0)
    return float(len(vectors) * np.square(vectors).sum() - total @ total)


def _error(steps: list[_Step], name: str) -> float:
    """Mean error over mean uses, after some steps to learn from."""
    need = make_need(name, layers=len(steps[0].used))
    errors, uses = [], []
    for number, step in enumerate(steps):
        estimate = _hear(need, step)
        if number >= min(_SETTLE, len(steps) // 4):
            errors.append(np.abs(estimate - step.used).mean())
            uses.append(np.mean(step.used))
    return rounded(float(np.mean(errors) / np.mean(uses)))


def _within(steps: list[_Step], name: str) -> float:
    sizes = range(2, _MOST + 1)
    alike = [[step for step in steps if step.batch == size] for size in sizes]
    return rounded(float(np.mean([_error(part, name) for part in alike if part])))


def _hear(need: Need, step: _Step) -> np.ndarray:
    need.begin_step(step.batch, step.diversity)
    estimate = need.blocks.copy()
    for layer, used in enumerate(step.used):
        need.fetched(layer, used)
    return estimate


def _counts(trace: RoutingTrace) -> dict[str, dict[str, float]]:
    """N_e by probabilities against K."""
    said = PregateBins(trace)
    predictor = Pregate(layers=trace.layers, experts=trace.num_experts, top_k=trace.top_k, distances=said.distances)
    counts: dict[str, list[int]] = {"cumulative": [], "sum": [], "K": []}
    for number, step in enumerate(trace.steps(1)):
        if number == _PREGATE_STEPS:
            break
        ahead = said.of_step(step.rows)
        predictor.on_step(step.tokens)
        for layer, rows in enumerate(step.routes[:-1]):
            predictor.on_ahead(layer, ahead[layer + 1])
            predictor.on_route(layer, rows)
            if number >= _PREGATE_STEPS // 4:
                scores = predictor.ahead(layer, 1)[0]
                counts["cumulative"].append(int(cumulative(scores).sum()))
                counts["sum"].append(int(top_k(scores).sum()))
                counts["K"].append(trace.top_k)
    return {
        name: {"mean": float(np.mean(found)), "error": float(np.abs(np.subtract(found, trace.top_k)).mean())}
        for name, found in counts.items()
    }


def _embeddings(trace: RoutingTrace) -> np.ndarray | None:
    """f32 `[V, D]` of the bundled model, if the trace is of it."""
    import ef_jax
    from ef_jax.loading import bundled_model

    if trace.model != bundled_model().name:
        return None
    lm = ef_jax.load(expert_fraction=1.0, context=64, prefetch="off", progress=False)
    return np.asarray(lm._engine.dense.top[0], np.float32)
