"""Missing experts that the host computes where they lie: the same bits, fewer bytes, and copies where that fails."""

from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from bench._emulated import EmulatedModels
from ef_jax.errors import InputError
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.schedule.link_model import LinkModel

PROMPTS = ["ROMEO:\nO, she doth teach", "oak tree"]
SLOW = LinkModel(bandwidth=50e6)  # 1.5 ms a block


def run(lm: ef_jax.LanguageModel) -> list[Any]:
    """Tokens and log-probabilities of a full batch, then of one that is half empty."""
    lm.stats.reset()
    results = [*lm.generate(PROMPTS, max_new_tokens=6, ignore_eos=True), *lm.generate(PROMPTS[1], max_new_tokens=4)]
    return [(result.tokens, np.float32(result.logprobs).view(np.uint32).tolist()) for result in results]


@pytest.fixture(scope="module")
def expected(models: EmulatedModels) -> list[Any]:
    return run(models.lm)


class Beside(HostExperts):
    """A host that is not the device."""

    def copy_seconds(self) -> None:
        return None


@pytest.mark.parametrize(("order", "host"), [("resident_first", HostExperts), ("together", Beside)])
def test_computed_misses_are_not_waited_for_and_change_no_bit(
    models: EmulatedModels, expected: list[Any], order: str, host: type[HostExperts]
) -> None:
    lm = models.make(0.25, SLOW, prefetch="off", order=order, miss="compute", host_kind=host)
    assert run(lm) == expected
    stats = lm.stats.as_dict()
    assert stats["slots"] < stats["experts"]
    decode = stats["decode"]
    assert decode["bytes_demand"] == sum(decode["misses"]) == 0 < stats["prefill"]["bytes_demand"]
    needed = [sum(of) for of in zip(decode["hits"], decode["late_hits"], decode["computed"], strict=True)]
    assert needed == models.lm.stats.decode.hits
    assert stats["computed"] > 0
    assert stats["bytes_prefetch"] <= stats["computed"] * lm.plan.block_bytes
    assert (stats["bytes_prefetch"] > 0) == (host is Beside)  # copied afterwards, for the next use
    assert stats["miss"]["choice"] == "compute"


def test_auto_splits_misses_while_predictions_are_fetched(models: EmulatedModels, expected: list[Any]) -> None:
    lm = models.make(0.25, SLOW, prefetch=2, miss="auto")
    assert run(lm) == expected
    decode = lm.stats.decode
    counts = zip(decode.hits, decode.late_hits, decode.misses, decode.computed, strict=True)
    assert [sum(of) for of in counts] == models.lm.stats.decode.hits
    assert sum(decode.computed) > 0
    assert decode.bytes_prefetch > 0
    assert decode.bytes_demand == sum(decode.misses) * lm.plan.block_bytes
    assert lm.stats.miss["compute_seconds"]["8"] > 0


def test_a_host_that_fails_leaves_the_copying(models: EmulatedModels, expected: list[Any]) -> None:
    class Failing(HostExperts):
        calls = 0

        def run(self, *arguments: Any) -> jax.Array:
            self.calls += 1
            if self.calls > 5:
                raise RuntimeError("made to fail\nat length")
            return super().run(*arguments)

    lm = models.make(0.25, SLOW, prefetch="off", miss="compute", host_kind=Failing)
    assert run(lm) == expected
    decode = lm.stats.decode
    assert 0 < sum(decode.computed) <= 5
    assert decode.bytes_demand == sum(decode.misses) * lm.plan.block_bytes > 0
    assert lm.stats.miss["off_because"].endswith("made to fail")


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InputError, match="miss 'skip' is not one of fetch, compute, auto"):
        ef_jax.load(miss="skip")
