"""Models on a mesh of eight devices: the results of one device, experts partitioned and offloaded on each."""

from typing import Any

import jax
import numpy as np
import pytest

import ef_jax
from ef_jax.errors import InputError

IDS = np.arange(5, 18, dtype=np.int32)
PROMPTS = [[5, 6, 7], [100, 9], list(range(40, 51)), [1], [8, 8, 8], [300, 301], [12], [13, 14, 15, 16]]
SIZES: dict[str, Any] = {"context": 32, "chunk": 2, "progress": False}


@pytest.fixture(scope="module")
def one() -> Any:
    """One device, a sequence at a time: as each device of the meshes has it."""
    return ef_jax.load(expert_fraction=0.25, **SIZES)


@pytest.fixture(scope="module")
def expected(one: Any) -> Any:
    """Its logits and continuations."""
    return one.logits(IDS), one.generate(PROMPTS, max_new_tokens=12)


@pytest.fixture(scope="module", params=["expert=8", "data=2,expert=2"])
def lm(request: Any) -> Any:
    """A mesh whose devices have slots for half of the experts that they hold."""
    return ef_jax.load(mesh=request.param, expert_fraction=0.5, **SIZES)


def test_results_are_those_of_one_device_bit_for_bit(lm: Any, expected: Any) -> None:
    logits, generations = expected
    assert np.array_equal(lm.logits(IDS), logits)
    got = lm.generate(PROMPTS, max_new_tokens=12)
    assert [one.tokens for one in got] == [one.tokens for one in generations]
    assert [one.logprobs for one in got] == [one.logprobs for one in generations]


def test_every_device_moves_its_own_experts_within_its_plan(lm: Any) -> None:
    lm.stats.reset()
    engine, plan = lm._engine, lm.plan
    before = [member.link.bytes_moved for member in engine.fleet.members]
    lm.generate(PROMPTS, max_new_tokens=8)
    moved = [member.link.bytes_moved - of for member, of in zip(engine.fleet.members, before, strict=True)]
    assert plan.slots < plan.experts
    assert all(moved)
    of_devices = lm.stats.as_dict()["devices"]
    assert [device["bytes_moved"] for device in of_devices] == moved
    assert [device["misses"] * plan.block_bytes for device in of_devices] == moved
    steps = lm.stats.decode.steps
    assert steps
    for member in engine.fleet.members:
        assert member.stats.decode.bytes_demand <= steps * plan.token_cycle * plan.block_bytes
    assert sum(moved) == lm.stats.prefill.bytes_demand + lm.stats.decode.bytes_demand
    for member in engine.fleet.members:
        held = {key for key in member.residency.key_of if key is not None}
        assert held
        assert all(member.holds[key] for key in held)
        assert len(held) <= plan.slots
    text = lm.stats.table()
    assert f"MB moved by {len(of_devices)} devices" in text


def test_caches_slots_and_weights_take_what_the_plan_of_a_device_says(lm: Any) -> None:
    lm.generate(PROMPTS[:2], max_new_tokens=2)
    engine, plan = lm._engine, lm.plan
    for member in engine.fleet.members:
        device = engine._layout.devices[member.number]

        def here(arrays: Any, device: jax.Device = device) -> int:
            shards = [shard for array in jax.tree.leaves(arrays) for shard in array.addressable_shards]
            return sum(shard.data.nbytes for shard in shards if shard.device == device)

        assert here(engine._rows.caches) == plan.kv_cache
        assert here(member.link.pool.array) == plan.cache_slots + plan.staging
        leaves = (engine.dense.layers, engine.dense.top)
        assert here(leaves) == plan.dense
    assert plan.total <= plan.budget
    assert lm.stats.peak_device_bytes > 0


def test_nothing_compiles_after_the_first_run(lm: Any) -> None:
    lm.generate(PROMPTS, max_new_tokens=12)
    count = lm._engine.programs.count
    lm.generate(PROMPTS[::-1], max_new_tokens=12)
    assert lm._engine.programs.count == count


def test_scores_by_steps_are_those_of_one_device(lm: Any, one: Any) -> None:
    tokens = list(range(20, 30))
    assert lm.score([tokens], by_steps=True) == one.score([tokens], by_steps=True)


def test_all_resident_on_the_mesh_that_is_set_moves_nothing(expected: Any) -> None:
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        lm = ef_jax.load(expert_fraction=1.0, **SIZES)
        got = lm.generate(PROMPTS, max_new_tokens=12)
    assert jax.sharding.get_mesh().empty
    assert [one.logprobs for one in got] == [one.logprobs for one in expected[1]]
    assert lm.plan.slots == lm.plan.experts == lm.spec.total_experts // 2
    assert lm.stats.as_dict()["misses"] == 0
    assert [device["bytes_moved"] for device in lm.stats.as_dict()["devices"]] == [0, 0]


def test_each_device_prefetches_by_its_own_horizon(expected: Any) -> None:
    lm = ef_jax.load(mesh={"expert": 2}, expert_fraction=0.3, prefetch="auto", emulate_link="2GB/s", **SIZES)
    got = lm.generate(PROMPTS, max_new_tokens=12)
    assert [one.logprobs for one in got] == [one.logprobs for one in expected[1]]
    members = lm._engine.fleet.members
    assert all(member.stats.decode.bytes_prefetch > 0 for member in members)
    assert all(member.stats.horizon is not None for member in members)
    assert len({id(member.scheduler) for member in members}) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "expert=3"}, "32 experts"),
        ({"mesh": "expert=16"}, "needs 16 devices"),
        ({"mesh": "expert=4", "batch": 6}, "give batch 4 or 8"),
        ({"mesh": "expert=4", "sequences": 8}, "sequences"),
        ({"mesh": "expert=4", "miss": "compute"}, "miss"),
        ({"mesh": "expert=4", "host_memory": "1GB"}, "host_memory"),
        ({"mesh": "expert=4", "lossy_skip": 0.1}, "lossy_skip"),
        ({"mesh": "expert=4", "exchange": "ragged"}, "ragged"),
        ({"mesh": "expert=4", "placement": "affine"}, "affine"),
        ({"placement": "other.npz"}, "placement"),
        ({"exchange": "padded"}, "exchange"),
        ({"mesh": "expert=2", "device": "first"}, "device"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], words: str) -> None:
    if "device" in options:
        options = {**options, "device": jax.devices()[0]}
    with pytest.raises(InputError, match=words) as caught:
        ef_jax.load(expert_fraction=0.5, **{**SIZES, **options})
    assert "\n" not in str(caught.value)
