"""Blocks of several arrays: their format, and how they come into their slots."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from ef_jax.errors import UnsupportedError
from ef_jax.memory.host_store import aligned_empty
from ef_jax.memory.slot_pool import MAX_INSERT, SlotPool
from ef_jax.runtime.slot_weights import slot_weights
from ef_jax.spec import BlockFormat, ModelSpec
from pallas_kernels import QuantizedPool, storage_dtype
from tests.schedule.tiny_store import SPEC

SLOTS = 11


def spec_of(*, bias: bool, quantization: str | None, dtype: str = "bfloat16") -> ModelSpec:
    experts = dataclasses.replace(SPEC.experts, width=96, bias=bias, quantization=quantization)
    return dataclasses.replace(SPEC, hidden=64, dtype=dtype, experts=experts)


FORMATS = {
    "plain": spec_of(bias=False, quantization=None),
    "biases": spec_of(bias=True, quantization=None),
    "mxfp4": spec_of(bias=False, quantization="mxfp4"),
    "mxfp4-and-biases": spec_of(bias=True, quantization="mxfp4"),
    "float32-biases": spec_of(bias=True, quantization="mxfp4", dtype="float32"),
}


def test_a_plain_block_is_its_weights() -> None:
    form = FORMATS["plain"].block_format
    assert (form.shape, form.dtype, form.nbytes) == ((3, 96, 64), np.dtype(ml_dtypes.bfloat16), 3 * 96 * 64 * 2)


def test_a_released_gpt_oss_block() -> None:
    """3 matrices of 2880 x 2880 at 4.25 bits a weight, and biases of 16 bits."""
    experts = dataclasses.replace(SPEC.experts, width=2880, bias=True, quantization="mxfp4")
    spec = dataclasses.replace(SPEC, hidden=2880, experts=experts)
    assert spec.block_bytes == 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 2
    assert spec.block_format.dtype == np.uint8


@pytest.mark.parametrize("name", FORMATS)
def test_parts_start_on_cache_lines_and_do_not_overlap(name: str) -> None:
    form = FORMATS[name].block_format
    end = 0
    for part in form.parts:
        assert part.offset % 64 == 0
        assert 0 <= part.offset - end < 64
        end = part.end
    assert 0 <= form.nbytes - end < 64
    assert np.empty(form.shape, form.dtype).nbytes == form.nbytes


def test_gaps_are_cleared_and_nothing_else() -> None:
    form = FORMATS["biases"].block_format
    block = np.full(form.nbytes, 255, np.uint8)
    form.clear_gaps(block)
    kept = np.zeros(form.nbytes, bool)
    for part in form.parts:
        kept[part.offset : part.end] = True
    assert (block == np.where(kept, 255, 0)).all()


def test_parts_of_one_shape_can_be_written_together() -> None:
    """As rows of gate and up are stored in turn."""
    form = FORMATS["mxfp4-and-biases"].block_format
    block = np.zeros(form.shape, form.dtype)
    both = form.place(block, ("gate_bias", "up_bias"))
    both[...] = np.arange(2 * 96).reshape(2, 96)
    parts = form.split(block)
    np.testing.assert_array_equal(parts["gate_bias"], np.arange(96).astype(both.dtype))
    np.testing.assert_array_equal(parts["up_bias"], np.arange(96, 192).astype(both.dtype))
    assert not any(
        parts[name].tobytes().strip(b"\0") for name in ("values", "gate_up_scales", "down_scales", "down_bias")
    )
    assert form.place(block, ("down_bias",)).shape == (64,)
    assert form.place(block, ()) is block


@pytest.mark.parametrize(
    ("sizes", "message"), [((64, 48), "width, got 48"), ((96, 64), "hidden size, got 96")], ids=["width", "hidden"]
)
def test_sizes_that_mxfp4_cannot_hold(sizes: tuple[int, int], message: str) -> None:
    hidden, width = sizes
    experts = dataclasses.replace(SPEC.experts, width=width, quantization="mxfp4")
    with pytest.raises(UnsupportedError, match=message):
        dataclasses.replace(SPEC, hidden=hidden, experts=experts)


def made_up(form: BlockFormat, seed: int) -> np.ndarray:
    block = aligned_empty(form.shape, form.dtype)
    block.reshape(-1).view(np.uint8)[:] = np.random.default_rng(seed).integers(0, 120, form.nbytes)
    return block


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_every_part_finds_its_slot(name: str, memory_kind: str) -> None:
    """More blocks than one insert takes, some slots twice; the slots in between stay as they were."""
    spec, device = FORMATS[name], jax.devices()[0]
    form = spec.block_format
    pool = SlotPool(spec, SLOTS, device, memory_kind=memory_kind)
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)
    slots = [4, 0, 7, 9, 1, 10, 4, 8, 2, 3]
    assert len(slots) > MAX_INSERT
    blocks = [made_up(form, seed) for seed in range(len(slots))]
    where = pool.latest.unsafe_buffer_pointer()
    pool.insert([jax.device_put(block.view(storage_dtype(form.dtype)), sharding) for block in blocks], slots)
    assert pool.latest.unsafe_buffer_pointer() == where
    held = pool.array if isinstance(pool.array, dict) else {"weights": pool.array}
    last = dict(zip(slots, blocks, strict=True))
    for part in form.parts:
        array = np.asarray(held[part.name])
        assert array.shape == (SLOTS, *part.shape)
        for slot in range(SLOTS):
            expected = form.split(last[slot])[part.name].view(array.dtype) if slot in last else np.zeros(part.shape)
            np.testing.assert_array_equal(array[slot], expected)


def test_what_kernels_get() -> None:
    pool = SlotPool(FORMATS["mxfp4-and-biases"], SLOTS, jax.devices()[0], memory_kind="device")
    weights, biases = slot_weights(FORMATS["mxfp4-and-biases"], pool.array)
    assert isinstance(weights, QuantizedPool)
    assert (weights.format, weights.shape, weights.groups) == ("mxfp4", (SLOTS, 3, 96, 64), (32, 32))
    assert biases is not None
    assert [(bias.shape, bias.dtype) for bias in biases] == [
        ((SLOTS, size), np.dtype(ml_dtypes.bfloat16)) for size in (96, 96, 64)
    ]
