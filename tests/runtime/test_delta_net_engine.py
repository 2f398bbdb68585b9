"""Engines whose layers keep recurrent states: passes that fail and come again, rows that change hands, bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ef_jax
from bench._models import over
from ef_jax.errors import LinkError
from ef_jax.families import spec_from_config
from ef_jax.replay.simulator import simulate
from ef_jax.runtime.engine import Engine
from ef_jax.schedule.device_link import DeviceLink, link_error
from ef_jax.weights.layout import Layout

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
OPTIONS: dict[str, Any] = {"batch": 2, "context": 40, "chunk": 2, "prefetch": "off", "progress": False}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint."""
    directory = tmp_path_factory.mktemp("delta_net")
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    random = np.random.default_rng(0)
    tensors = {}
    for name, expected in Layout(spec_from_config(CONFIG), "per_expert").tensors().items():
        scale = expected.shape[-1] ** -0.5 if len(expected.shape) > 1 else 0.3
        tensors[name] = (scale * random.normal(size=expected.shape)).astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    return directory


def prompts() -> list[list[int]]:
    """Of one chunk and of several."""
    random = np.random.default_rng(1)
    return [random.integers(0, 48, length).tolist() for length in (23, 5, 8, 2)]


@pytest.fixture(scope="module")
def resident(path: Path) -> Any:
    return ef_jax.load(path, expert_fraction=1.0, **OPTIONS)


def with_slots(lm: Any, fraction: float) -> Any:
    """The same weights and programs with slots for a share of the experts; those that it does not have are staging."""
    plan, slots = lm.plan, int(fraction * lm.plan.experts)
    plan = dataclasses.replace(plan, slots=slots, staging_slots=plan.staging_slots + plan.slots - slots)
    return over(lm, plan, lm._engine.programs, "lru", Engine)


@pytest.fixture(scope="module")
def offloaded(resident: Any) -> Any:
    return with_slots(resident, 0.25)


@pytest.fixture(scope="module")
def roomy(path: Path) -> Any:
    """An engine with more rows than a step takes."""
    return ef_jax.load(path, expert_fraction=0.25, sequences=3, **OPTIONS)


@pytest.fixture(scope="module")
def expected(resident: Any) -> list[Any]:
    """Of each prompt by itself, in rows that nobody has had."""
    results = []
    for prompt in prompts():
        resident._engine._rows.clear()
        results.append(run(resident, [prompt])[0])
    assert resident.stats.decode.bytes_demand == 0
    return results


def run(lm: Any, given: list[list[int]]) -> list[Any]:
    """Tokens and bits of the log-probabilities."""
    results = lm.generate(given, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return [(result.tokens, np.float32(result.logprobs).view(np.uint32).tolist()) for result in results]


def test_offloaded_is_all_resident(offloaded: Any, expected: list[Any]) -> None:
    """More prompts than rows, so that rows change hands, with company of other lengths."""
    offloaded.stats.reset()
    assert run(offloaded, prompts()) == expected
    assert run(offloaded, prompts()[::-1]) == expected[::-1]
    assert sum(offloaded.stats.decode.misses) > 0 < offloaded.stats.decode.bytes_demand


def test_logits(offloaded: Any, resident: Any, expected: list[Any]) -> None:
    prompt, (tokens, _) = prompts()[0], expected[0]
    ours, theirs = (lm.logits(prompt) for lm in (offloaded, resident))
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert ours[-1].argmax() == tokens[0]


def test_more_rows_than_a_step_takes_and_a_replay(roomy: Any, expected: list[Any]) -> None:
    lm = with_slots(roomy, 0.25)
    with lm.trace() as recording:
        assert run(lm, prompts()) == expected
    plan, stats = lm.plan, lm.stats
    replayed = simulate(recording.trace(), policy="lru", slots=plan.slots, staging_slots=plan.staging_slots)
    for name in ("hits", "misses", "bytes_demand", "steps", "tokens"):
        assert getattr(replayed.decode, name) == getattr(stats.decode, name), name


class Failing:
    """Makes the first attempt of a pass fail at one of its demand copies, each time another one."""

    def __init__(self, lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = {"prompt_pass": 0, "step": 0}
        self.layers: set[int] = set()
        self._left: int | None = None
        self._again = False
        self._turn = 0
        fetch = DeviceLink.fetch

        def unreliable(link: DeviceLink, keys: Any) -> Any:
            if self._left == 0:
                self.layers.add(keys[0][0])
                raise link_error(keys, "made to fail")
            if self._left is not None:
                self._left -= 1
            return fetch(link, keys)

        monkeypatch.setattr(DeviceLink, "fetch", unreliable)
        for name in self.failures:
            monkeypatch.setattr(lm._engine, name, self._fail_first(name, getattr(lm._engine, name)))

    def _fail_first(self, name: str, run: Any) -> Any:
        def attempt(*arguments: Any) -> Any:
            self._turn += not self._again
            self._left = None if self._again else self._turn % 3
            self._again = False
            try:
                return run(*arguments)
            except LinkError:
                self._again = True
                self.failures[name] += 1
                raise
            finally:
                self._left = None

        return attempt


@pytest.mark.parametrize("rows", ["as many as a step takes", "more"])
def test_passes_that_fail_come_again_and_change_no_bit(
    rows: str, resident: Any, roomy: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = with_slots(roomy if rows == "more" else resident, 0.0)
    failing = Failing(lm, monkeypatch)
    assert run(lm, prompts()) == expected
    assert failing.failures["prompt_pass"] >= 4
    assert failing.failures["step"] >= 12
    assert failing.layers == {0, 1}


def test_states_are_in_the_plan_and_stay_where_they_are(offloaded: Any) -> None:
    caches = offloaded._engine._rows.caches
    assert offloaded.plan.kv_cache == sum(array.nbytes for layer in caches for array in layer)
    assert [len(layer) for layer in caches] == [3, 2]
    before = [array.unsafe_buffer_pointer() for array in caches[0]]
    run(offloaded, prompts()[:1])
    assert [array.unsafe_buffer_pointer() for array in offloaded._engine._rows.caches[0]] == before
