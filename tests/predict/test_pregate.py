"""Pre-gate probabilities: true where scores say something, harmless where they are wrong."""

import numpy as np
import pytest

from ef_jax.predict import History, Predictor, Pregate
from ef_jax.predict.log_odds import log_odds, to_bins, union

L, E, K, H = 3, 32, 4, 2


class World:
    """Made-up steps: routers that choose by scores, and pre-gates that see them through noise."""

    def __init__(self, *, sequences: int = 1, wrong: str = "", seed: int = 0) -> None:
        self.random, self.sequences, self.wrong = np.random.default_rng(seed), sequences, wrong

    def step(self) -> tuple[np.ndarray, list[list[list[int]]]]:
        """Bins by source, uint8 `[L, H+1, E]`, and the experts `[L][B][K]`."""
        random, all_active = self.random, np.ones(self.sequences, bool)
        scores = random.standard_normal((self.sequences, L, E)).astype(np.float32)
        bins = np.zeros((L, H + 1, E), np.uint8)
        for source in range(L):
            for distance in range(1, min(H, L - source) + 1):
                seen = scores[:, source - 1 + distance]
                seen = seen + 0.5 * distance * random.standard_normal(seen.shape).astype(np.float32)
                if self.wrong == "random":
                    seen = random.standard_normal(seen.shape).astype(np.float32)
                if self.wrong == "opposite":
                    seen = -seen
                if self.wrong == "nan":
                    seen = np.full_like(seen, np.nan)
                bins[source, distance] = to_bins(union(log_odds(seen, K, np), all_active, np), np)
        return bins, np.argsort(-scores, axis=-1)[..., :K].transpose(1, 0, 2).tolist()


def run(world: World, steps: int, *, count_from: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[n, H, L, E]` before each layer, NaN where there are none, and uses `[n, L, E]`."""
    pregate = Pregate(layers=L, experts=E, top_k=K, distances=H)
    told = np.full((steps, H, L, E), np.nan, np.float32)
    used = np.zeros((steps, L, E), bool)
    for number in range(steps):
        bins, routes = world.step()
        pregate.on_step([0] * world.sequences)
        pregate.on_ahead(-1, bins[0])
        for layer in range(-1, L):
            if layer >= 0:
                used[number, layer, np.ravel(routes[layer])] = True
                if layer < L - 1:
                    pregate.on_ahead(layer, bins[layer + 1])
                pregate.on_route(layer, routes[layer])
            ahead = pregate.ahead(layer, H)
            for distance in range(1, min(H, L - 1 - layer) + 1):
                told[number, distance - 1, layer + distance] = ahead[distance - 1]
    return told[count_from:], used[count_from:]


@pytest.mark.parametrize("sequences", [1, 4])
def test_probabilities_are_frequencies(sequences):
    told, used = run(World(sequences=sequences), 500, count_from=200)
    for distance in range(H):
        p, y = told[:, distance, distance:].ravel(), used[:, distance:].ravel()
        tenth = np.clip((p * 10).astype(int), 0, 9)
        off = [abs(p[tenth == part].mean() - y[tenth == part].mean()) for part in range(10) if (tenth == part).any()]
        share = [(tenth == part).mean() for part in range(10) if (tenth == part).any()]
        assert np.dot(off, share) < 0.02
        assert p.max() > 0.8
        assert ((p - y) ** 2).mean() < 0.8 * y.mean() * (1 - y.mean())


@pytest.mark.parametrize("wrong", ["random", "opposite", "nan"])
def test_scores_that_are_wrong_end_at_the_base_rate(wrong):
    told, used = run(World(wrong=wrong), 400, count_from=250)
    p, y = told[:, 0], used
    base = K / E
    assert p.mean() == pytest.approx(base, abs=0.02)
    assert np.quantile(p, 0.99) < 3 * base
    assert ((p - y) ** 2).mean() < 1.05 * base * (1 - base)


def test_cold_scores_are_worth_what_they_stand_for():
    pregate = Pregate(layers=L, experts=E, top_k=K, distances=H)
    assert isinstance(pregate, Predictor)
    bins, _ = World().step()
    pregate.on_step([0])
    pregate.on_ahead(-1, bins[0])
    stands_for = 1 / (1 + np.exp(-(bins[0, 1:].astype(np.float32) - 127.5) / 16))
    np.testing.assert_allclose(pregate.ahead(-1, H), stands_for, atol=0.03)
    np.testing.assert_allclose(pregate.step_scores()[:H], stands_for, atol=0.03)


def test_history_speaks_where_there_are_no_scores():
    pregate, history = Pregate(layers=L, experts=E, top_k=K, distances=H), History(layers=L, experts=E)
    world = World()
    for _ in range(20):
        bins, routes = world.step()
        for predictor in (pregate, history):
            predictor.on_step([0])
        pregate.on_ahead(-1, bins[0])
        np.testing.assert_array_equal(pregate.ahead(-1, L)[H:], history.ahead(-1, L)[H:])
        for layer in range(L):
            for predictor in (pregate, history):
                predictor.on_route(layer, routes[layer])
            np.testing.assert_array_equal(
                pregate.ahead(layer, L)[L - 1 - layer :], history.ahead(layer, L)[L - 1 - layer :]
            )


def test_a_nearer_source_replaces_what_a_farther_one_said():
    pregate = Pregate(layers=L, experts=E, top_k=K, distances=H)
    bins, routes = World().step()
    pregate.on_step([0])
    pregate.on_ahead(-1, bins[0])
    from_far = pregate.ahead(-1, H)[1].copy()
    pregate.on_route(0, routes[0])
    np.testing.assert_array_equal(pregate.ahead(0, 1)[0], from_far)  # no bins of this source
    pregate.on_ahead(0, bins[1])
    assert (pregate.ahead(0, 1)[0] != from_far).any()


def test_recent_use_raises_the_probability_of_the_same_score():
    """Constant scores, and experts that stay in use for long: only what happened before tells them apart."""
    random = np.random.default_rng(0)
    pregate = Pregate(layers=1, experts=E, top_k=K, distances=1)
    used = random.permutation(E)[:K]
    bins = np.full((2, E), 100, np.uint8)
    for _ in range(400):
        if random.random() < 0.1:
            used = random.permutation(E)[:K]
        pregate.on_step([0])
        pregate.on_ahead(-1, bins)
        told = pregate.ahead(-1, 1)[0].copy()
        last, routes = used, [used.tolist()]
        pregate.on_route(0, routes)
    assert told[last].min() > 3 * np.delete(told, last).mean()
