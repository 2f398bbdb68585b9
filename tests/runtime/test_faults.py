"""Whatever predictors and links do, tokens are the all-resident run's, or one clear line says why there are none."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from bench._emulated import EmulatedModels
from ef_jax.errors import LinkError
from ef_jax.predict import Oracle, Pregate
from ef_jax.runtime import look_ahead
from ef_jax.schedule.device_link import DeviceLink, link_error
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.prefetch import CANDIDATES

ORDERS = ("resident_first", "together")
LAYERS, EXPERTS, TOP_K = 8, 32, 4
FAST = LinkModel(bandwidth=20e9)
SLOW = LinkModel(bandwidth=20e6)
PROMPTS = ["ROMEO:\nO, she doth teach", "oak tree"]
SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(models: EmulatedModels) -> list[Any]:
    models.lm.stats.reset()
    outputs = run(models.lm)
    assert models.lm.stats.as_dict()["misses"] == 0
    return [*outputs, list(models.lm.stats.decode.hits)]


def run(lm: ef_jax.LanguageModel) -> list[Any]:
    """Tokens and log-probabilities of a full batch, then of one that is half empty."""
    results = [*lm.generate(PROMPTS, **SAMPLING), *lm.generate(PROMPTS[1], **SAMPLING)]
    return [(result.tokens, np.float32(result.logprobs).view(np.uint32).tolist()) for result in results]


def check(lm: ef_jax.LanguageModel, expected: list[Any]) -> dict[str, Any]:
    """The stats of a run that gave what was expected, and counted every expert that it needed once."""
    lm.stats.reset()
    outputs = run(lm)
    stats = lm.stats.as_dict()
    decode = stats["decode"]
    needed = [sum(counts) for counts in zip(decode["hits"], decode["late_hits"], decode["misses"], strict=True)]
    assert [*outputs, needed] == expected
    assert sum(decode["misses"]) > 0
    assert decode["bytes_demand"] == sum(decode["misses"]) * lm.plan.block_bytes
    return stats


@pytest.mark.parametrize(
    ("predictor", "prefetch", "fraction"),
    [
        ("pregate", "off", 0.1),
        ("pregate", "auto", 0.1),
        ("pregate", "auto", 0.5),
        ("pregate", 1, 0.5),
        ("pregate", 3, 0.25),
        ("pregate", LAYERS, 0.1),
        ("history", "auto", 0.25),
        ("history", LAYERS, 0.5),
    ],
)
def test_horizons_and_predictors(
    models: EmulatedModels, expected: list[Any], predictor: str, prefetch: int | str, fraction: float
) -> None:
    stats = check(models.make(fraction, FAST, prefetch=prefetch, predictor=predictor), expected)
    assert (stats["bytes_prefetch"] > 0) == (prefetch != "off")


@pytest.mark.parametrize(("candidates", "order"), [*zip(CANDIDATES, itertools.cycle(ORDERS), strict=False)])
def test_rules_and_orders(models: EmulatedModels, expected: list[Any], candidates: str, order: str) -> None:
    stats = check(models.make(0.25, FAST, prefetch=4, candidates=candidates, order=order), expected)
    assert stats["bytes_prefetch"] > 0


@pytest.mark.parametrize("policy", ["two_level", "plec", "static"])
def test_policies(models: EmulatedModels, expected: list[Any], policy: str) -> None:
    check(models.make(0.25, FAST, policy=policy), expected)


class Wrong(Oracle):
    """Is sure of every expert that will not be used, and of no other."""

    def ahead(self, layer: int, horizon: int) -> np.ndarray:
        return 1 - super().ahead(layer, horizon)


def test_a_predictor_that_is_always_wrong(models: EmulatedModels, expected: list[Any]) -> None:
    with models.lm.trace() as recording:
        run(models.lm)
    steps = [step.routes for step in recording.trace().steps() if not step.prompt]
    wrong = Wrong(steps, layers=LAYERS, experts=EXPERTS)
    stats = check(models.make(0.5, FAST, prefetch=2, predictor=wrong), expected)
    assert stats["bytes_wasted"] > 0
    assert stats["late_hits"] == 0


class Failing(Pregate):
    """Breaks down at some call of one of its methods, or gives what is no probability."""

    def __init__(self, method: str, gives: Any = None, after: int = 20) -> None:
        super().__init__(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, distances=4)
        self._left = after
        good = getattr(self, method)

        def call(*arguments: Any) -> Any:
            self._left -= 1
            if self._left >= 0:
                return good(*arguments)
            if gives is None:
                raise RuntimeError("made to fail")
            return np.full_like(good(*arguments), gives)

        setattr(self, method, call)


@pytest.mark.parametrize(
    ("method", "gives", "after"),
    [
        ("on_step", None, 3),
        ("on_ahead", None, 20),
        ("on_route", None, 20),
        ("ahead", None, 20),
        ("step_scores", None, 3),
        ("ahead", np.nan, 20),
        ("ahead", np.inf, 20),
        ("step_scores", np.nan, 3),
        ("on_ahead", None, 0),
    ],
)
def test_a_predictor_that_breaks_down(
    models: EmulatedModels, expected: list[Any], method: str, gives: Any, after: int
) -> None:
    stats = check(models.make(0.25, FAST, prefetch=2, predictor=Failing(method, gives, after)), expected)
    reason = stats["horizon"]["off_because"]
    assert "the predictor Failing failed" in reason
    assert ("made to fail" if gives is None else "not numbers") in reason
    if after > 0:
        assert stats["bytes_prefetch"] > 0


def test_scores_that_are_no_numbers(
    models: EmulatedModels, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = look_ahead.stack_routers

    def damaged(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * np.nan, stack(*arguments))

    monkeypatch.setattr(look_ahead, "stack_routers", damaged)
    stats = check(models.make(0.25, FAST, prefetch=2), expected)
    assert stats["recall"] is not None


@pytest.mark.parametrize("order", ORDERS)
def test_a_link_that_becomes_a_thousand_times_slower(models: EmulatedModels, expected: list[Any], order: str) -> None:
    lm = models.make(0.5, FAST, order=order)
    check(lm, expected)
    lm._engine.link.set_model(SLOW)
    check(lm, expected)


class Unreliable(DeviceLink):
    """A link on which every second prefetch fails, or every demand copy where `broken`."""

    prefetching = True
    broken = False

    def fetch(self, keys: Sequence[tuple[int, int]]) -> list[jax.Array]:
        if self.broken or (self.prefetching and any((layer + expert) % 2 for layer, expert in keys)):
            raise link_error(keys, "made to fail")
        return super().fetch(keys)


class OnDemandOnly(EmulatedLink):
    """Demand copies go well, prefetches fail as the real link has them fail."""

    def start(self, layer: int, experts: Sequence[int]) -> Any:
        self._link.prefetching = False
        try:
            return super().start(layer, experts)
        finally:
            self._link.prefetching = True


class Lost(EmulatedLink):
    """No prefetch ever comes."""

    def arrived(self) -> list[tuple[int, int]]:
        super(EmulatedLink, self).arrived()
        return []

    def take(self, key: tuple[int, int]) -> float:
        return float("inf")


def test_prefetches_that_fail_are_copied_on_demand(models: EmulatedModels, expected: list[Any]) -> None:
    lm = models.make(0.25, FAST, prefetch=3, link_kind=OnDemandOnly, device_link_kind=Unreliable)
    stats = check(lm, expected)
    assert stats["horizon"]["prefetches_failed"] > 0
    assert stats["bytes_prefetch"] > 0
    assert lm._engine.residency.in_flight == []


def test_prefetches_that_never_come_are_copied_on_demand(models: EmulatedModels, expected: list[Any]) -> None:
    stats = check(models.make(0.25, FAST, prefetch=1, link_kind=Lost, timeout=1e-3), expected)
    assert stats["horizon"]["prefetches_failed"] > 0


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_a_demand_copy_that_fails_ends_the_run_in_one_line_and_harms_no_other(
    models: EmulatedModels, expected: list[Any], where: str
) -> None:
    lm = models.make(0.25, FAST, prefetch=2, link_kind=OnDemandOnly, device_link_kind=Unreliable)
    real = lm._engine.link._link
    pieces = 0

    def break_down(_sequence: int, _text: str) -> None:
        nonlocal pieces
        pieces += 1
        real.broken = pieces > 4

    real.broken = where == "prompt"
    with pytest.raises(LinkError, match=r"^experts? \d+ .*cannot be copied to the device: made to fail$"):
        lm.generate(PROMPTS, **SAMPLING, on_text=break_down)
    real.broken = False
    check(lm, expected)


def test_a_demand_copy_that_never_comes_ends_the_run_in_one_line(models: EmulatedModels) -> None:
    lm = models.make(0.25, FAST, timeout=0.05)
    lm._engine.link.set_model(LinkModel(bandwidth=1.0))
    with pytest.raises(LinkError, match=r"nothing has come for 0\.05 s"):
        run(lm)


def test_arrays_that_a_failed_program_took_are_made_anew():
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    engine, expected = lm._engine, lm.generate([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)
    for array in (engine.link.pool.array, engine._rows.caches[3][0], engine._rows.seen, engine._last):
        array.delete()
    engine.recover()
    again = lm.generate([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)
    assert (again[0].tokens, again[0].logprobs) == (expected[0].tokens, expected[0].logprobs)
    assert lm.stats.decode.bytes_demand > 0
