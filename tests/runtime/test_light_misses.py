"""Misses of little weight: left out or computed in 4 bits, and nothing else of a run changes."""

import dataclasses
import gc
from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from bench._emulated import EmulatedModels
from ef_jax.errors import InputError, LinkError, UnsupportedError
from ef_jax.lossy import LossyOptions
from ef_jax.runtime import light_misses, steps
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.small_link import SmallLink
from ef_jax.spec import ModelSpec
from ef_jax.weights import open_checkpoint

PROMPTS = [[5, 17, 300, 9, 2100], [40, 41, 8]]
OPTIONS = {"expert_fraction": 0.25, "batch": 2, "context": 64, "chunk": 16, "progress": False}


def load(**options: Any) -> Any:
    return ef_jax.load(**OPTIONS, **options)


def decode(lm: Any) -> tuple[list[list[int]], np.ndarray]:
    made = lm.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    return [one.tokens for one in made], np.float32([one.logprobs for one in made]).view(np.uint32)


@pytest.fixture(scope="module")
def lossless() -> tuple[Any, Any]:
    lm = load()
    return decode(lm), lm.stats.decode


@pytest.mark.parametrize("options", [{"lossy_skip": 0.0}, {"lossy_low_precision_miss": 0}], ids=["skip", "4-bits"])
def test_a_bound_of_zero_changes_no_bit(lossless: Any, options: dict[str, float]) -> None:
    lm = load(**options)
    (tokens, bits), counts = lossless
    ours = decode(lm)
    assert ours[0] == tokens
    assert np.array_equal(ours[1], bits)
    same = ("hits", "misses", "bytes_demand", "bytes_prefetch", "skipped", "low_precision")
    assert [getattr(lm.stats.decode, name) for name in same] == [getattr(counts, name) for name in same]
    assert counts.bytes_demand > 0
    assert lm.stats.slots < lm.stats.experts


def test_a_bound_of_zero_changes_no_bit_beside_a_look_ahead(models: EmulatedModels) -> None:
    fast = LinkModel(bandwidth=20e9)
    (one, other) = (models.make(0.25, fast, prefetch="off", skip=skip) for skip in (None, 0.0))
    (tokens, bits), ours = decode(one), decode(other)
    assert ours[0] == tokens
    assert np.array_equal(ours[1], bits)
    assert other.stats.decode.misses == one.stats.decode.misses
    assert other.stats.recall == one.stats.recall is not None
    assert sum(other.stats.decode.skipped) == 0 < other.stats.decode.bytes_demand


def test_nothing_is_fetched_where_every_miss_is_skipped(lossless: Any) -> None:
    lm = load(lossy_skip=1)
    tokens, _ = decode(lm)
    counts, moved = lm.stats.decode, lm._engine.link.bytes_moved
    assert sum(counts.misses) == counts.bytes_moved == 0 < moved == lm.stats.prefill.bytes_demand
    assert sum(counts.skipped) > 0 < sum(counts.hits)
    assert lm.stats.as_dict()["skipped"] == sum(counts.skipped)
    assert f"{sum(counts.skipped)} absent experts of little weight were left out" in lm.stats.table()
    assert tokens != lossless[0][0]


def test_some_are_skipped_and_some_come_in_4_bits() -> None:
    gc.collect()
    before = device_bytes()
    lm = load(lossy_skip=0.05, lossy_low_precision_miss=0.25)
    decode(lm)
    counts, link = lm.stats.decode, lm._engine.link
    assert min(sum(counts.misses), sum(counts.skipped), sum(counts.low_precision)) > 0
    assert counts.bytes_demand == sum(counts.misses) * lm.plan.block_bytes
    low_bytes = lm.plan.host_light_misses // lm.plan.experts
    assert counts.bytes_low_precision == sum(counts.low_precision) * low_bytes
    assert low_bytes < 0.3 * lm.plan.block_bytes
    assert link.bytes_moved == counts.bytes_moved + lm.stats.prefill.bytes_moved
    assert lm.plan.items["light_misses"] == 2 * lm.spec.experts.top_k * low_bytes
    assert device_bytes() - before + lm._engine.programs.temp_bytes <= lm.plan.budget


def test_what_comes_in_4_bits_is_the_expert_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the plain weights' results, in numpy: another expert's would have nothing to do with them."""
    seen = []
    real = light_misses.LowPrecisionMisses.run

    def run(self: Any, layer: int, routed: Any, kept: Any, outputs: jax.Array) -> jax.Array:
        computed = real(self, layer, routed, kept, outputs)
        seen.append((layer, routed, kept, computed))
        return computed

    monkeypatch.setattr(light_misses.LowPrecisionMisses, "run", run)
    lm = load(lossy_low_precision_miss=1)
    decode(lm)
    assert sum(lm.stats.decode.misses) == lm.stats.decode.bytes_demand == 0
    for layer, routed, kept, outputs in seen[:: len(seen) // 5]:
        ours = np.asarray(steps.combine_step(lm.spec, routed, outputs), np.float32)
        plain = combined(lm, layer, routed, kept)
        assert np.linalg.norm(ours - plain) < 0.2 * np.linalg.norm(plain)


def test_what_does_not_come_in_4_bits_comes_in_full(lossless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, layer: int, experts: list[int]) -> Any:
        raise LinkError("no")

    monkeypatch.setattr(SmallLink, "start", fail)
    lm = load(lossy_low_precision_miss=1.0)
    tokens, bits = decode(lm)
    assert tokens == lossless[0][0]
    assert np.array_equal(bits, lossless[0][1])
    assert sum(lm.stats.decode.misses) > 0 == sum(lm.stats.decode.low_precision) + lm.stats.decode.bytes_low_precision


def test_the_largest_weight_of_an_expert_decides() -> None:
    rows, weights = [[3, 1], [1, 7]], [[0.9, 0.1], [0.3, 0.2]]
    assert light_misses.lighter([1, 7], rows, weights, 0.25) == [7]
    assert light_misses.lighter([3, 1, 7], rows, weights, 0.4) == [1, 7]
    assert light_misses.lighter([3, 1], rows, weights, light_misses.weight_bound(1, 2.5)) == [3, 1]
    assert light_misses.weight_bound(0.2, 2.5) == 0.5


def test_options_that_make_no_sense_are_refused(small_moe: Any) -> None:
    with pytest.raises(InputError, match=r"lossy_skip 0\.3 leaves nothing for lossy_low_precision_miss 0\.2"):
        LossyOptions(skip=0.3, low_precision_miss=0.2)
    with open_checkpoint(small_moe) as checkpoint:
        spec = checkpoint.spec
    for changed, why in (({"quantization": "int8"}, "are int8 already"), ({"width": 48}, "have sizes, 48 and half")):
        other = dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, **changed))
        with pytest.raises(UnsupportedError, match=f"lossy_low_precision_miss .* this model's {why}"):
            LossyOptions(low_precision_miss=0.1).check(other)


def combined(lm: Any, layer: int, routed: Any, kept: list[int]) -> np.ndarray:
    """What the experts `kept` add to each token, of plain weights in float32."""
    spec: ModelSpec = lm.spec
    ids, weights, h = (np.asarray(array[:, 0], np.float32) for array in (routed.ids, routed.weights, routed.h))
    output = np.zeros((len(ids), 1, spec.hidden), np.float32)
    with open_checkpoint(lm.path) as checkpoint:
        block = np.empty(spec.block_shape, jax.numpy.dtype(spec.dtype))
        for expert in kept:
            checkpoint.read_block(spec.moe_layers[layer], expert, block)
            gate, up, down = block.astype(np.float32)
            for token, place in np.argwhere(ids == expert):
                a = gate @ h[token]
                y = (a / (1 + np.exp(-a)) * (up @ h[token])) @ down
                output[token, 0] += weights[token, place] * y
    return output


def device_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")
