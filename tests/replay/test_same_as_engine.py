"""A recorded run, replayed with the same slots, counts exactly what the engine counted, whatever the policy."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import ef_jax
from bench._models import over
from ef_jax.memory.policies import POLICIES
from ef_jax.replay.simulator import simulate
from ef_jax.runtime.engine import Engine

# Sequences of one chunk and of several, more than a batch; some end before others.
LENGTHS = ((3, 21, 9, 5, 12), (20,), (6, 6))
NEW_TOKENS = (6, 5, 3)


@pytest.fixture(scope="module", params=[1, 4], ids=["batch 1", "batch 4"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return ef_jax.load(expert_fraction=0.5, batch=request.param, context=32, chunk=8)


def with_slots(lm: Any, slots: int, policy: str) -> Any:
    """The same weights and programs with a smaller cache; the slots that it does not have are staging."""
    plan = lm.plan
    plan = dataclasses.replace(plan, slots=slots, staging_slots=plan.staging_slots + plan.slots - slots)
    return over(lm, plan, lm._engine.programs, policy, Engine)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_counts_what_the_engine_counted(loaded: Any, policy: str, fraction: float) -> None:
    lm = with_slots(loaded, int(fraction * loaded.plan.experts), policy)
    random = np.random.default_rng(0)
    with lm.trace() as recording:
        for lengths, new_tokens in zip(LENGTHS, NEW_TOKENS, strict=True):
            prompts = [random.integers(1, 4096, length) for length in lengths]
            lm.generate(prompts[: lm.plan.batch + 1], max_new_tokens=new_tokens)
    replayed = simulate(recording.trace(), policy=policy, slots=lm.plan.slots, staging_slots=lm.plan.staging_slots)
    assert sum(lm.stats.decode.misses) > 0 < sum(lm.stats.decode.hits)
    for ours, theirs in ((replayed.prefill, lm.stats.prefill), (replayed.decode, lm.stats.decode)):
        for name in ("hits", "late_hits", "misses", "bytes_demand", "bytes_prefetch", "steps", "tokens"):
            assert getattr(ours, name) == getattr(theirs, name), name
