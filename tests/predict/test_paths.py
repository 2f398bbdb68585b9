"""Predicted paths alone and together with pre-gate scores: true where they say something, harmless where wrong."""

import itertools

import numpy as np
import pytest

from ef_jax.predict import History, Paths, Predictor, Pregate
from ef_jax.predict.calibration import LEVELS, levels
from ef_jax.predict.log_odds import log_odds, to_bins, union_bins

L, E, K, H = 3, 32, 4, 2
BASE = K / E


class World:
    """Made-up steps: routers that choose by scores, seen through noise by path predictors and by pre-gates.

    Args:
      paths: how path predictors see them: "good", "random", "opposite", or "bold", good and far too sure of it.
      noise: of pre-gates, standard deviations a layer of distance.
    """

    def __init__(self, *, paths: str = "good", noise: float = 2.0, sequences: int = 1) -> None:
        self.random, self.paths, self.noise, self.sequences = np.random.default_rng(0), paths, noise, sequences

    def step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Path bins `[L, E]`, pre-gate bins by source `[L, H+1, E]`, and the experts `[L, B, K]`."""
        scores = self.random.standard_normal((self.sequences, L, E)).astype(np.float32)
        seen = scores + self._noise(scores, 1.0)
        if self.paths == "random":
            seen = self._noise(scores, 1.0)
        odds = log_odds(seen, K, np) * {"opposite": -1, "bold": 3}.get(self.paths, 1)
        paths = union_bins(to_bins(odds, np))
        ahead = np.zeros((L, H + 1, E), np.uint8)
        for source, distance in itertools.product(range(L), range(1, H + 1)):
            if (target := source - 1 + distance) < L:
                told = scores[:, target] + self._noise(scores[:, target], self.noise * distance)
                ahead[source, distance] = union_bins(to_bins(log_odds(told, K, np), np))
        return paths, ahead, np.argsort(-scores, axis=-1)[..., :K].transpose(1, 0, 2)

    def _noise(self, like: np.ndarray, deviation: float) -> np.ndarray:
        return np.float32(deviation) * self.random.standard_normal(like.shape).astype(np.float32)


def run(predictor, world: World, steps: int, *, count_from: int, paths=True, ahead=True) -> tuple[np.ndarray, ...]:
    """Probabilities at the beginning of steps and just before each layer, `[n, L, E]`, and uses."""
    first, last, used = np.zeros((3, steps, L, E), np.float32)
    for number in range(steps):
        bins, said, routes = world.step()
        predictor.on_step([0] * world.sequences)
        if paths:
            predictor.on_paths(bins)
        first[number] = predictor.step_scores()
        for layer in range(L):
            if ahead:
                predictor.on_ahead(layer - 1, said[layer])
            last[number, layer] = predictor.ahead(layer - 1, 1)[0]
            used[number, layer, np.ravel(routes[layer])] = 1
            predictor.on_route(layer, routes[layer].tolist())
    return first[count_from:], last[count_from:], used[count_from:]


def error(told: np.ndarray, used: np.ndarray) -> float:
    """Of the probabilities, as a share of that of the base rate."""
    return float(((told - used) ** 2).mean() / (used.mean() * (1 - used.mean())))


def fused() -> Pregate:
    return Pregate(layers=L, experts=E, top_k=K, distances=H)


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("paths", ["good", "bold"])
def test_probabilities_are_frequencies(paths, sequences):
    for predictor in (Paths(layers=L, experts=E, top_k=K), fused()):
        first, last, used = run(predictor, World(paths=paths, sequences=sequences), 500, count_from=200)
        for told in (first, last):
            tenth = np.clip((told * 10).astype(int), 0, 9)
            off = [
                abs(told[tenth == part].mean() - used[tenth == part].mean()) * (tenth == part).mean()
                for part in range(10)
                if (tenth == part).any()
            ]
            assert sum(off) < 0.02
            assert told.max() > 0.6
        assert error(first, used) < 0.85


def test_both_together_are_better_than_either():
    """Near the layer by much; and until the pre-gate speaks of a layer, paths are all that is known."""
    world = {"paths": "good", "noise": 1.0}
    *_, both, used = run(fused(), World(**world), 500, count_from=200)
    *_, path_alone, _ = run(fused(), World(**world), 500, count_from=200, ahead=False)
    *_, gate_alone, _ = run(fused(), World(**world), 500, count_from=200, paths=False)
    assert error(both, used) < 0.9 * min(error(path_alone, used), error(gate_alone, used))


@pytest.mark.parametrize("paths", ["random", "opposite"])
def test_wrong_paths_end_at_the_base_rate_and_cost_the_pregate_nothing(paths):
    first, last, used = run(fused(), World(paths=paths, noise=0.5), 500, count_from=300)
    assert first.mean() == pytest.approx(BASE, abs=0.02)
    assert np.quantile(first, 0.99) < 3 * BASE
    assert error(first, used) < 1.05
    *_, alone, _ = run(fused(), World(paths=paths, noise=0.5), 500, count_from=300, paths=False)
    assert error(last, used) < error(alone, used) + 0.03


def test_steps_without_paths_are_those_of_history():
    paths, history, world = Paths(layers=L, experts=E, top_k=K), History(layers=L, experts=E), World()
    assert isinstance(paths, Predictor)
    for number in range(40):
        bins, _, routes = world.step()
        for predictor in (paths, history):
            predictor.on_step([0])
        if number % 2:
            paths.on_paths(bins)
            assert (paths.step_scores() != history.step_scores()).any()
        else:
            np.testing.assert_array_equal(paths.step_scores(), history.step_scores())
        for layer in range(L):
            for predictor in (paths, history):
                predictor.on_route(layer, routes[layer].tolist())
        np.testing.assert_array_equal(paths.ahead(L - 1, L), history.ahead(L - 1, L))  # of the next step


def test_the_paths_of_the_next_step_outlast_what_this_one_uses():
    world, paths = World(), Paths(layers=L, experts=E, top_k=K)
    (now, _, routes), (then, _, _) = world.step(), world.step()
    paths.on_step([0])
    paths.on_paths(now, then)
    for layer in range(L):
        paths.on_route(layer, routes[layer].tolist())
    foreseen = paths.ahead(L - 1, L).copy()
    assert np.corrcoef(foreseen.ravel(), then.ravel())[0, 1] > 0.8
    paths.on_step([0])
    paths.on_paths(then)
    assert np.corrcoef(foreseen.ravel(), paths.step_scores().ravel())[0, 1] > 0.8  # something was learned meanwhile


def test_cold_paths_are_worth_what_they_stand_for():
    paths = Paths(layers=L, experts=E, top_k=K)
    bins = np.random.default_rng(0).integers(0, 256, (L, E), dtype=np.uint8)
    paths.on_step([0])
    paths.on_paths(bins)
    stands_for = 1 / (1 + np.exp(-(bins.astype(np.float32) - 127.5) / 16))
    np.testing.assert_allclose(paths.step_scores(), stands_for, atol=0.03)


def test_levels_rise_with_the_odds_over_the_usual():
    general = np.full((1, 64), 0.1, np.float32)
    usual = levels(general, 0.1)
    assert usual.dtype == np.uint16
    assert usual.min() == usual.max() == (LEVELS - 1) // 2
    spread = np.linspace(0, 1, 64, dtype=np.float32)[None]
    rising = levels(spread, 0.1)[0].astype(int)
    assert (np.diff(rising) >= 0).all()
    assert (rising[0], rising[-1]) == (0, LEVELS - 1)
    assert levels(np.zeros((1, 4), np.float32), 0.25).max() == 0
    assert levels(np.ones((1, 4), np.float32), 0.25).max() < LEVELS  # everything is used
