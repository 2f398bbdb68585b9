"""The paper's predictor: a random forest that estimates by how much pre-gate scores are off."""

import time
from typing import Any, NamedTuple

import numpy as np

from ef_jax.nn.correction import CorrectionSpec
from ef_jax.nn.correction_parallel import TokenInputs
from ef_jax.predict.log_odds import log_odds

TREES = 20
_SETTINGS = {"n_estimators": TREES, "max_features": 0.1, "min_samples_leaf": 4, "random_state": 0}
_TIMED_CALLS = 20


class Forest(NamedTuple):
    """Probabilities `[M, L, H, E]` of the tokens asked for, seconds of training, and us of one token's predictions."""

    probabilities: np.ndarray
    seconds: float
    us_per_layer: list[float]


def installed() -> bool:
    """Whether scikit-learn is."""
    try:
        import sklearn.ensemble  # noqa: F401
    except ImportError:
        return False
    return True


def forest(spec: CorrectionSpec, learned: TokenInputs, asked: TokenInputs) -> Forest:
    """One scikit-learn forest a source, trained on `learned`, asked about `asked`.

    As in ExpertFlow-S, it is given the pre-gate scores, the token id and the experts of past layers, and here also
    the decayed counts of what earlier tokens used, and estimates use less the probability by the pre-gate score.
    """
    from sklearn.ensemble import RandomForestRegressor

    spent, times, out = 0.0, [], np.zeros(asked.choice.shape, np.float32)
    for source in range(spec.layers):
        count = min(spec.distances, spec.layers - source)
        base, wanted = (_base(spec, inputs, source, count) for inputs in (learned, asked))
        model = RandomForestRegressor(**_SETTINGS, n_jobs=-1)
        began = time.perf_counter()
        model.fit(_features(spec, learned, source, count), _used(spec, learned, source, count) - base)
        spent += time.perf_counter() - began
        features = _features(spec, asked, source, count)
        out[:, source, :count] = (wanted + model.predict(features)).reshape(-1, count, spec.experts)
        model.n_jobs = 1  # threads only slow a single row down
        for row in features[:_TIMED_CALLS]:
            began = time.perf_counter()
            model.predict(row[None])
            times.append(1e6 * (time.perf_counter() - began))
    return Forest(out, spent, times)


def _base(spec: CorrectionSpec, inputs: TokenInputs, source: int, count: int) -> np.ndarray:
    choice = np.asarray(inputs.choice[:, source, :count], np.float32)
    return (1 / (1 + np.exp(-log_odds(choice, spec.top_k, np)))).reshape(len(choice), -1)


def _features(spec: CorrectionSpec, inputs: TokenInputs, source: int, count: int) -> np.ndarray:
    rows = len(inputs.tokens)
    past = np.zeros((rows, source, spec.experts), np.float32)
    np.put_along_axis(past, np.asarray(inputs.experts[:, :source], np.intp), 1, axis=2)
    counts = inputs.counts[:, :, source : source + count]
    parts: list[Any] = [inputs.choice[:, source, :count], inputs.tokens, past, counts]
    return np.concatenate([np.asarray(part, np.float32).reshape(rows, -1) for part in parts], axis=1)


def _used(spec: CorrectionSpec, inputs: TokenInputs, source: int, count: int) -> np.ndarray:
    used = np.zeros((len(inputs.tokens), count, spec.experts), np.float32)
    np.put_along_axis(used, np.asarray(inputs.experts[:, source : source + count], np.intp), 1, axis=2)
    return used.reshape(len(used), -1)
