"""Part "prediction" of `bench.routing_path`: recall of the routing path against baselines and the pre-gate."""

from typing import Any

import numpy as np
from flax import nnx

from bench import _report
from bench._path_baselines import BASELINES, bins_of
from bench._routing_path_data import Fitted, Options, on_bundled, on_trace
from ef_jax.predict.path_metrics import Candidates, candidate_counts, candidates, reliability

BATCHES = (1, 4, 16)


def run(options: Options) -> dict[str, Any]:
    """The part's tables, and its figures as JSON."""
    result = {}
    if options.trace is not None:
        result["trace"] = _described("trace", on_trace(options))
        print()
    bundled = on_bundled(options)
    result["bundled"] = _described("bundled model", bundled)
    if bundled.reported.pregate is not None:
        print()
        result["bundled"]["against_pregate"] = _against_pregate(bundled)
    return result


def _described(name: str, fitted: Fitted) -> dict[str, Any]:
    reported = fitted.reported
    scores: dict[str, np.ndarray] = {"routing path": fitted.bins}
    scores |= {baseline: score(fitted.learned, reported) for baseline, score in BASELINES.items()}
    batches = [batch for batch in BATCHES if batch <= reported.sequences]
    measured = {
        each: {batch: candidates(of, reported, batch=batch) for batch in batches} for each, of in scores.items()
    }
    counts = candidate_counts(reported.top_k)
    head = [f"{name}: recall %", *(f"@{count}, batch {batch}" for batch in batches for count in counts[:2])]
    rows = [
        [each, *(_mean(of[batch][place].recall) for batch in batches for place in range(2))]
        for each, of in measured.items()
    ]
    print(_report.table(head, rows))
    print()
    layers = range(reported.layers)
    head = [f"{name}: recall % by layer", *map(str, layers)]
    rows = [[f"{each} @{one.number}", *_percent(one.recall)] for each, of in measured.items() for one in of[1][:2]]
    print(_report.table(head, rows))
    calibration = {
        each: reliability(of if of.dtype == np.uint8 else bins_of(of), reported) for each, of in scores.items()
    }
    print()
    told = calibration["routing path"]
    seen = np.flatnonzero(told.predictions)
    print(
        _report.table(
            [f"{name}: calibration of the routing path, %", *(f"bin {16 * group}" for group in seen)],
            [["predicted", *_percent(told.predicted[seen])], ["used", *_percent(told.used[seen])]],
        )
    )
    errors = {each: _report.rounded(100 * of.error) for each, of in calibration.items()}
    print("expected calibration error, points: " + ", ".join(f"{each} {error:.2f}" for each, error in errors.items()))
    training = fitted.training
    weights = [leaf for _, leaf in nnx.iter_graph(fitted.path) if isinstance(leaf, nnx.Param)]
    parameters = sum(int(np.prod(leaf.get_value().shape)) for leaf in weights)
    print(
        f"{parameters} parameters, {4e-6 * parameters:.1f} MB as float32; trained on {training.tokens} tokens in "
        f"{training.steps} steps, {training.seconds:.0f} s; {reported.count} tokens reported"
    )
    return {
        "tokens": training.tokens,
        "reported_tokens": reported.count,
        "reported_sequences": reported.sequences,
        "parameters": parameters,
        "steps": training.steps,
        "seconds": _report.rounded(training.seconds),
        "recall_held_out_of_training": _report.rounded(float(100 * training.recall.mean())),
        "candidates": list(counts),
        "measured": {
            each: {str(batch): [_as_json(one, batch == 1) for one in parts] for batch, parts in of.items()}
            for each, of in measured.items()
        },
        "calibration_error_points": errors,
        "reliability": {
            "predicted": _percent(told.predicted),
            "used": _percent(told.used),
            "predictions": told.predictions.tolist(),
        },
    }


def _against_pregate(fitted: Fitted) -> dict[str, Any]:
    """Recall at K of layers, by the routing path and by the pre-gate of each distance."""
    trace = fitted.reported
    assert trace.pregate is not None
    own = candidates(fitted.bins, trace)[0].recall
    distances = trace.pregate.shape[2]
    ahead = np.full((distances, trace.layers), np.nan)
    for distance in range(1, distances + 1):
        scores = np.zeros((trace.count, trace.layers, trace.num_experts), np.float32)
        scores[:, distance - 1 :] = trace.pregate[:, : trace.layers - distance + 1, distance - 1]
        ahead[distance - 1, distance - 1 :] = candidates(scores, trace)[0].recall[distance - 1 :]
    rows = [["routing path", *_percent(own)]]
    rows += [[f"pre-gate, {distance} ahead", *_percent(row)] for distance, row in enumerate(ahead, 1)]
    print(_report.table([f"recall % @{trace.top_k} by layer", *map(str, range(trace.layers))], rows))
    better = [
        [layer for layer in range(trace.layers) if own[layer] > row[layer]] for row in ahead
    ]  # NaN is never beaten
    for distance, layers in enumerate(better, 1):
        of = int(np.isfinite(ahead[distance - 1]).sum())
        gain = float(100 * np.nanmean(own - ahead[distance - 1]))
        print(
            f"{distance} ahead: the routing path beats the pre-gate in {len(layers)} of {of} layers; mean {gain:+.1f}"
        )
    return {
        "routing_path": _percent(own),
        "pregate": [_percent(row) for row in ahead],
        "layers_where_better": better,
        "mean_gain": [_report.rounded(float(100 * np.nanmean(own - row))) for row in ahead],
    }


def _as_json(one: Candidates, by_layer: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "candidates": one.number,
        "recall": _mean(one.recall),
        "precision": _mean(one.precision),
    }
    return told | ({"recall_by_layer": _percent(one.recall)} if by_layer else {})


def _mean(values: np.ndarray) -> float:
    return _report.rounded(float(100 * values.mean()))


def _percent(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(100 * value), 2) for value in values]
