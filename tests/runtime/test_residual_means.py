"""Mean residual streams, and what they are worth to pre-gate scores."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ef_jax
from ef_jax.errors import InputError
from ef_jax.nn import pregate, stack_routers
from ef_jax.runtime.residual_means import ResidualMeans, logit_shifts

DISTANCES = 5


@pytest.fixture(scope="module")
def lm() -> Any:
    return ef_jax.load(expert_fraction=1.0, batch=1, context=128, chunk=128)


@pytest.fixture(scope="module")
def texts(lm: Any) -> list[list[int]]:
    """Eight texts of 100 tokens of each of two domains, one after the other."""
    parts = []
    for name in ("bible", "python"):
        ids = lm.tokenizer.encode((lm.path / "valid" / f"{name}.txt").read_text()[:6000])
        parts.append([[0, *ids[first : first + 99]] for first in range(1, 793, 99)])
    return [text for pair in zip(*parts, strict=True) for text in pair]


class Streams:
    """Keeps the residual streams that routers read, and what they chose."""

    def __init__(self) -> None:
        self.x: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []

    def listen(self, serve: Any, tokens: Any, positions: np.ndarray, rows: np.ndarray) -> Any:
        seen = positions > 0

        def listening(layer: int, carried: Any) -> Any:
            self.x.append(np.asarray(carried[0].x)[seen])
            self.ids.append(np.asarray(carried[0].ids)[seen])
            return serve(layer, carried)

        return listening


def test_means_are_of_normed_streams_but_for_first_tokens(lm: Any, texts: list[list[int]]) -> None:
    means = lm.residual_means(texts[:2])
    assert (means.shape, means.dtype) == ((9, 192), np.float32)
    streams = Streams()
    with lm._listening(streams):
        lm.score(texts[:2])
    for layer in range(8):
        x = np.concatenate(streams.x[layer::8]).astype(np.float64)
        assert len(x) == 2 * 99
        expected = (x / np.sqrt((x * x).mean(-1, keepdims=True))).mean(0)
        np.testing.assert_allclose(means[layer + 1], expected, atol=1e-3)


def test_shifts_improve_what_is_predicted_on_other_text(lm: Any, texts: list[list[int]]) -> None:
    stack = stack_routers(lm.spec, lm._engine.dense.layers, DISTANCES)
    shifts = logit_shifts(lm.spec, stack, lm.residual_means(texts[:8]), DISTANCES)
    assert shifts.shape == (9, DISTANCES, 32)
    assert not shifts[8].any()
    assert not shifts[5, 3:].any()
    streams = Streams()
    with lm._listening(streams):
        lm.score(texts[8:])
    x, ids = ([np.concatenate(kept[layer::8]) for layer in range(8)] for kept in (streams.x, streams.ids))
    gains = []
    for source in range(2, 6):
        recalls = []
        for shift in (np.zeros_like(shifts[source]), shifts[source]):
            scores = pregate(
                lm.spec, stack, jnp.asarray(x[source - 1]), jnp.int32(source), DISTANCES, jnp.asarray(shift)
            )
            guess = np.argsort(-np.asarray(scores), axis=-1)[..., :4]
            hits = [
                (guess[:, d, :, None] == ids[source + d][:, None]).any(-1).mean() for d in range(min(3, 8 - source))
            ]
            recalls.append(np.mean(hits))
        gains.append(recalls[1] - recalls[0])
    assert np.mean(gains) > 0.005


def test_nothing_to_measure(lm: Any) -> None:
    with pytest.raises(InputError, match="no residual streams were seen"):
        lm.residual_means([[5]])
    with pytest.raises(InputError, match="no residual streams were seen"):
        ResidualMeans(lm.spec, lm._engine.dense).means()
    with lm.trace(), pytest.raises(InputError, match="a trace is being recorded already"):
        lm.residual_means([[5, 6]])
