"""Experts in int8 and int4: offloaded runs are the all-resident runs of the same blocks, bit for bit, with fewer bytes
moved."""

from typing import Any

import numpy as np
import pytest

import ef_jax

IDS = np.random.default_rng(0).integers(1, 4096, 16).astype(np.int32)


@pytest.mark.parametrize(
    ("quantization", "label", "share"),
    [("int4", "int4:32", 0.282), pytest.param("int8", "int8", 0.518, marks=pytest.mark.slow)],
)
def test_offloaded_is_all_resident_bit_for_bit(quantization: str, label: str, share: float) -> None:
    def run(fraction: float) -> tuple[Any, list[int], list[float]]:
        lm = ef_jax.load(expert_fraction=fraction, context=32, chunk=16, lossy_quantize=quantization, progress=False)
        made = lm.generate([IDS], max_new_tokens=12, ignore_eos=True)[0]
        return lm, made.tokens, made.logprobs

    resident, *expected = run(1.0)
    lm, *ours = run(0.25)
    assert ours == expected
    stats, plan = lm.stats.as_dict(), lm.plan
    assert resident.stats.as_dict()["bytes_demand"] == 0
    assert plan.slots < plan.experts
    assert stats["bytes_demand"] == stats["misses"] * plan.block_bytes > 0
    assert plan.block_bytes == pytest.approx(share * 3 * 64 * 192 * 2, rel=0.01), "scales included"
    assert stats["lossy"] == {"lossy_quantize": label}
    assert label in str(plan)
