"""Loading: what is refused before anything is allocated, and what a load leaves in memory."""

import gc

import jax
import numpy as np
import pytest

import ef_jax
from ef_jax.weights import open_checkpoint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "belady"}, "policy 'belady' is not one of lru, lfu, lfru, two_level, plec, static, next_use"),
        ({"context": 2048}, "context 2048 is longer than the model's 1024 positions"),
        ({"context": -5}, "context must be at least 2 tokens, got -5"),
        ({"context": 0}, "context must be at least 2 tokens, got 0"),
        ({"batch": 0}, "batch must be between"),
        ({"chunk": -1}, "chunk must be positive"),
        ({"expert_fraction": 1.5}, "expert_fraction must be between 0 and 1, got 1.5"),
        ({"expert_fraction": 0.5, "device_memory": "1GB"}, "either device_memory or expert_fraction"),
        ({"device_memory": "lots"}, "'lots' is not a size in bytes"),
        ({"device_memory": "-3GB"}, "'-3GB' is not a size in bytes"),
        ({"copy_mode": "teleport"}, "copy mode 'teleport' is not one of"),
        ({"dtype": "int8"}, "int8"),
        ({"path": "/nowhere/at/all"}, "there is no directory"),
        ({"path": ""}, "it is not a checkpoint"),  # an unset variable must not load the bundled model
    ],
)
def test_bad_options_are_refused(options, message):
    gc.collect()
    before = len(jax.live_arrays())
    with pytest.raises(ef_jax.InputError, match=message):
        ef_jax.load(**options)
    assert len(jax.live_arrays()) == before


def test_a_deleted_model_gives_its_memory_back_at_once():
    gc.collect()
    before = len(jax.live_arrays())
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    with lm.trace():
        lm.generate([[5, 6, 7]], max_new_tokens=4)
    gc.disable()  # reference counts alone must do
    try:
        del lm
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_experts_land_packed_one_pinned_array_each(small_moe):
    before = {id(array) for array in jax.live_arrays()}
    lm = ef_jax.load(expert_fraction=0.25, context=64, chunk=16)
    pinned = [
        array
        for array in jax.live_arrays()
        if id(array) not in before and array.sharding.memory_kind == "pinned_host" and array.ndim == 3
    ]
    assert len(pinned) == lm.plan.experts == 256
    assert {array.shape for array in pinned} == {(3, 64, 192)}
    expected = np.empty((3, 64, 192), "bfloat16")
    with open_checkpoint(small_moe) as checkpoint:
        checkpoint.read_block(5, 17, expected)
    assert np.array_equal(np.asarray(lm._engine.link._store.block(5, 17)), expected.view(np.uint16))


def test_the_plan_comes_before_anything_is_allocated():
    before = sum(array.nbytes for array in jax.live_arrays())
    heard = []

    def on_plan(plan: ef_jax.MemoryPlan) -> None:
        heard.append((plan, sum(array.nbytes for array in jax.live_arrays())))

    lm = ef_jax.load(device_memory="16MB", context=64, chunk=16, on_plan=on_plan)
    ((plan, allocated),) = heard
    assert plan is lm.plan
    assert allocated == before
    assert plan.total <= 16_000_000 < plan.total + 2 * plan.block_bytes
    assert 0 < plan.slots < plan.experts


def test_a_bound_on_wasted_bytes_reaches_the_scheduler():
    options = {"expert_fraction": 0.25, "context": 64, "chunk": 16, "emulate_link": "1GB/s"}
    lm = ef_jax.load(most_wasted=0.25, prefetch=2, **options)
    lm.generate([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)
    assert lm.stats.horizon["waste"]["most"] == 0.25
    with pytest.raises(ef_jax.InputError, match=r"most_wasted 1\.5: give a share"):
        ef_jax.load(most_wasted=1.5, **options)


def test_the_kernel_that_was_asked_for_is_the_one_that_runs():
    options = {"expert_fraction": 0.25, "context": 64, "chunk": 16}
    plain, slow = (ef_jax.load(kernel=kernel, **options) for kernel in (None, "reference"))
    assert plain.kernels == {"decode": "xla", "prompt": "xla"}
    assert slow.kernels == {"decode": "reference", "prompt": "reference"}
    first, second = (lm.generate([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)[0] for lm in (plain, slow))
    assert first.tokens == second.tokens
    assert first.logprobs != second.logprobs  # other roundings: it was another kernel
    with pytest.raises(ef_jax.InputError, match="kernel 'cublas' is not one of"):
        ef_jax.load(kernel="cublas", **options)
