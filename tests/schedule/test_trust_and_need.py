"""What is measured of predictors, and estimates of what steps need."""

import numpy as np
import pytest

from ef_jax.errors import InputError
from ef_jax.schedule.nearest_first import cumulative, threshold, top_k
from ef_jax.schedule.need import NEEDS, make_need
from ef_jax.schedule.trust import Trust

LAYERS, EXPERTS = 6, 32


def trust_in(told, *, distances: int = 2, steps: int = 60) -> list[float]:
    """The factors after some steps in which `told(probabilities, used)` was predicted."""
    random = np.random.default_rng(0)
    trust = Trust(layers=LAYERS, distances=distances)
    for _ in range(steps):
        for layer in range(LAYERS):
            probabilities = random.beta(0.4, 2.0, (distances, EXPERTS)).astype(np.float32)
            trust.told(layer, told(probabilities))
            for distance in range(1, distances + 1):
                told_of = trust._told[(layer + distance) % LAYERS]
                if told_of is not None and told_of.distance == distance:
                    used = (random.random(EXPERTS) < probabilities[distance - 1]).nonzero()[0]
                    trust.used((layer + distance) % LAYERS, used.tolist())
    return trust.of


def test_probabilities_that_are_frequencies_are_trusted() -> None:
    assert min(trust_in(lambda p: p)) > 0.85


def test_what_claims_twice_too_much_is_halved_and_what_claims_too_little_is_left() -> None:
    assert trust_in(lambda p: 2 * p) == pytest.approx([0.5, 0.5], abs=0.07)
    assert trust_in(lambda p: p / 2) == [1.0, 1.0]


def test_what_is_always_wrong_is_not_trusted() -> None:
    assert max(trust_in(lambda p: (p < 0.01).astype(np.float32))) < 0.05


@pytest.mark.parametrize("name", NEEDS)
def test_constant_needs_are_learned(name) -> None:
    need = make_need(name, layers=3)
    for _ in range(20):
        need.begin_step(2, 5.0)
        for layer in range(3):
            need.fetched(layer, layer + 1)
    need.begin_step(2, 5.0)
    assert need.blocks == pytest.approx([1, 2, 3], rel=0.05)


@pytest.mark.parametrize(("name", "errors"), [("mean", (0.2, 1.0)), ("batch", (0.0, 0.1)), ("diversity", (0.0, 0.1))])
def test_larger_batches_need_more(name, errors) -> None:
    need, random, off = make_need(name, layers=1), np.random.default_rng(0), []
    for number in range(300):
        batch = int(random.integers(1, 9))
        need.begin_step(batch, float(batch**2))
        blocks = round(40 * batch**0.7)
        if number > 100:
            off.append(abs(float(need.blocks[0]) - blocks) / blocks)
        need.fetched(0, blocks)
    assert errors[0] <= np.mean(off) <= errors[1]


def test_no_such_estimate() -> None:
    with pytest.raises(InputError, match="need 'guess' is not one of mean, batch, diversity"):
        make_need("guess", layers=1)


def test_rules_name_experts() -> None:
    scores = np.array([0.05, 0.9, 0.5, 0.3, 0.25], np.float32)
    assert threshold(scores).nonzero()[0].tolist() == [1, 2]
    assert top_k(scores).nonzero()[0].tolist() == [1, 2]
    assert cumulative(scores).nonzero()[0].tolist() == [1, 2, 3, 4]
    assert not cumulative(np.zeros(5, np.float32)).any()
    assert not top_k(np.zeros(5, np.float32)).any()
