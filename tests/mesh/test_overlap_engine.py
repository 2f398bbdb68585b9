"""Two passes of prompts side by side, on CPU devices: the results of one after another, and nothing more is moved."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from ef_jax.errors import InputError, LinkError
from ef_jax.generation import Generation
from ef_jax.mesh.engine import MeshEngine
from ef_jax.mesh.side_by_side import SideBySide
from ef_jax.runtime import pass_shapes
from ef_jax.runtime.language_model import LanguageModel

WIDTH = 16
SIZES: dict[str, Any] = {"context": 72, "chunk": WIDTH, "progress": False, "expert_fraction": 0.5}
PROMPTS = ["def add(a, b):\n    return a + b\n" * count for count in (3, 1, 2, 3, 1, 2, 2)]
"""Of one to three chunks, all of the same width."""


@pytest.fixture(scope="module")
def small_passes() -> Iterator[None]:
    """A pass takes one prompt of a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_shapes, "PASS_TOKENS", WIDTH)
        yield


def loaded(overlap: str) -> LanguageModel:
    return ef_jax.load(mesh="expert=2", batch=6, overlap=overlap, **SIZES)


@pytest.fixture(scope="module")
def on(small_passes: None) -> LanguageModel:
    return loaded("on")


@pytest.fixture(scope="module")
def off(small_passes: None) -> LanguageModel:
    return loaded("off")


@pytest.fixture(scope="module")
def alone(small_passes: None) -> list[Generation]:
    """What one device makes of the prompts, with as many rows as each of the mesh has."""
    return ef_jax.load(batch=3, **SIZES).generate(PROMPTS, max_new_tokens=1)


def engine(model: LanguageModel) -> MeshEngine:
    assert isinstance(model._engine, MeshEngine)
    return model._engine


def same(these: list[Generation], those: list[Generation]) -> bool:
    return all(
        one.tokens == other.tokens and one.logprobs == other.logprobs for one, other in zip(these, those, strict=True)
    )


def watch(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts waves that ran beside another pass, and those that had to run by themselves."""
    counts = {"beside": 0, "alone": 0}
    beside, finish = SideBySide._beside, SideBySide.finish

    def counted_beside(self: SideBySide, *arguments: Any) -> Any:
        counts["beside"] += self._waiting is not None
        return beside(self, *arguments)

    def counted_finish(self: SideBySide) -> None:
        counts["alone"] += self._waiting is not None
        finish(self)

    patch.setattr(SideBySide, "_beside", counted_beside)
    patch.setattr(SideBySide, "finish", counted_finish)
    return counts


def test_results_are_those_of_passes_one_after_another(
    on: LanguageModel, off: LanguageModel, alone: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = watch(monkeypatch)
    layers = len(engine(on).spec.moe_layers)
    made = on.generate(PROMPTS, max_new_tokens=1)
    assert same(made, alone)
    assert counts["beside"] > 2 * (layers - 1)
    assert on.plan.slots < on.plan.experts
    assert on.stats.prefill.bytes_moved > 0
    counts["beside"] = 0
    assert same(off.generate(PROMPTS, max_new_tokens=1), alone)
    assert counts["beside"] == 0
    assert off.stats.prefill.tokens == on.stats.prefill.tokens
    programs = engine(on).programs.count
    assert same(on.generate(PROMPTS, max_new_tokens=1), alone)
    assert engine(on).programs.count == programs


def run(model: LanguageModel, parts: list[tuple[int, int]], words: int = 500) -> list[bytes]:
    """One pass over chunks of some rows' prompts, random ones of so many words; the caches that it leaves."""
    stepper, random = engine(model), np.random.default_rng(0)
    for row in range(stepper.rows):
        prompt = random.integers(3, 3 + words, size=2 * WIDTH).astype(np.int32)
        stepper.join(row, prompt, ef_jax.SamplingOptions(), 0)
    stepper.prepare(2 * WIDTH, 2 * WIDTH)
    stepper.prompt_pass(WIDTH, parts)
    caches = [np.asarray(array).tobytes() for array in jax.tree.leaves(stepper._rows.caches)]
    for row in range(stepper.rows):
        stepper.leave(row)
    stepper._rows.clear()
    stepper.rest()
    return caches


def test_any_number_of_turns(on: LanguageModel, off: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one device three turns, of the other two: all but the odd one out have company."""
    counts = watch(monkeypatch)
    layers = len(engine(on).spec.moe_layers)
    parts = [(0, 0), (1, 0), (2, 0), (3, 0), (5, 0)]
    caches = run(on, parts)
    assert counts["beside"] == 2 * (layers - 1)
    assert caches == run(off, parts)


def test_devices_may_have_different_numbers_of_waves(on: LanguageModel, off: LanguageModel) -> None:
    waves: list[list[int]] = []
    fleet = engine(on).fleet
    serve = fleet.serve_prompt

    def counted(layer, counts, start, **options):  # type: ignore[no-untyped-def]
        started = [0] * len(fleet.members)

        def counting(member, pool, slot_row):  # type: ignore[no-untyped-def]
            started[member] += 1
            start(member, pool, slot_row)

        kept = serve(layer, counts, counting, **options)
        waves.append(started)
        assert (kept >= 0).any(axis=1).sum() <= len(fleet.members)
        return kept

    parts = [(0, 0), (1, 0), (3, 0)]
    fleet.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "serve_prompt", counted)
        caches = run(on, parts, words=2)
    assert any(len(set(of_devices)) > 1 for of_devices in waves)
    assert caches == run(off, parts, words=2)


def test_a_pass_that_broke_off_can_be_run_again(on: LanguageModel, off: LanguageModel) -> None:
    parts = [(0, 0), (1, 0), (3, 0)]
    link = engine(on).fleet.members[1].link
    start, calls = link.start, 0

    def failing(layer: int, experts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise LinkError("no copy")
        return start(layer, experts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "start", failing)
        with pytest.raises(LinkError, match="no copy"):
            run(on, parts)
        assert calls == 7
        assert not engine(on)._company.keeps
        assert engine(on)._company._waiting is None
        caches = run(on, parts)
    engine(on).rest()
    assert caches == run(off, parts)


def test_prompts_fill_both_passes_and_their_workspace_is_planned(on: LanguageModel, off: LanguageModel) -> None:
    assert (engine(on).lanes(WIDTH), engine(off).lanes(WIDTH)) == (4, 2)
    assert engine(on).lanes(2) == engine(off).lanes(2) == 6  # one pass takes all rows
    assert on.plan.workspace == engine(on).programs.workspace_bytes > off.plan.workspace
    assert on.stats.as_dict()["overlap"] == {"passes": 2, "reason": "asked for"}


def test_auto_decides_by_what_is_measured(small_passes: None) -> None:
    """A CPU's exchange is not hidden by anything, but what a loaded machine measures is anybody's guess."""
    model = loaded("auto")
    report = model.stats.as_dict()["overlap"]
    assert "of the exchange was hidden" in report["reason"]
    one, two = report["predicted_seconds"]["1"], report["predicted_seconds"]["2"]
    assert 0 < two <= one * 1.001
    assert report["passes"] == (2 if two < one / 1.01 else 1)
    assert one == pytest.approx(2 * 8 * sum(report["layer_seconds"].values()))


def test_the_option_is_checked() -> None:
    with pytest.raises(InputError, match="overlap 'maybe' is not one of auto, on, off"):
        ef_jax.load(mesh="expert=2", overlap="maybe", **SIZES)
    with pytest.raises(InputError, match="overlap is of several devices"):
        ef_jax.load(overlap="on", **SIZES)
