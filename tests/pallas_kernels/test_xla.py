"""What is the XLA backend's own: blocks in parts, no computed end of a loop off the CPU, no copy of the pool."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    ExpertBiases,
    Target,
    dequantize,
    grouped_ffn,
    lossy_quantize,
    slot_grouped_matmul,
    to_storage,
)
from pallas_kernels.grouped_ffn import xla
from pallas_kernels.grouped_ffn.quantized import FORMATS, Format
from tests.pallas_kernels.base import assert_close, bits, ffn_f64, in_f64

D, F, S = 64, 48, 7
GPU = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132)
SLOTS = np.int32([3, -1, 0, 6, 5])
SIZES = np.int32([4, 3, 0, 20, 1])


def run(target: Target | None = None, **options: Any) -> Any:
    return jax.jit(functools.partial(grouped_ffn, tile_rows=8, implementation="xla", target=target, **options))


def rows_and_pool(dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(33, D)), dtype), jnp.asarray(rng.normal(size=(S, 3, F, D)) * 0.2, dtype)


@pytest.mark.parametrize(("part_bytes", "parts"), [(3 * F * D * 4 // 5, 6), (3 * D * 4 * 16, 3)])
def test_blocks_in_parts(monkeypatch: pytest.MonkeyPatch, part_bytes: int, parts: int) -> None:
    monkeypatch.setattr(xla, "PART_BYTES", part_bytes)
    x, pool = rows_and_pool("float32")
    compute = run()
    y = compute(x, pool, SLOTS, SIZES, out=jnp.full_like(x, 9))
    total = int(SIZES.sum())
    expected = ffn_f64(in_f64(x), in_f64(pool), SLOTS, SIZES)
    expected[4:7], expected[total:] = 9, 9
    assert_close(y, expected, 1e-5)
    assert f"{F // parts},{D}]" in compute.lower(x, pool, SLOTS, SIZES).compile().as_text()
    lone = compute(x[7:], pool, np.int32([6]), np.int32([20]))
    assert np.array_equal(bits(lone[:20]), bits(y[7:27]))
    one_each = run()(x, pool, np.full(33, 6, np.int32), None)
    assert_close(one_each, ffn_f64(in_f64(x), in_f64(pool), [6], [33]), 1e-5)


@pytest.mark.parametrize("format", [form for form in FORMATS if form != "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantized_blocks_in_parts(monkeypatch: pytest.MonkeyPatch, format: Format, dtype: str) -> None:
    """Parts hold whole groups of weights that share a scale, three of 32 here; parts of an int8 channel share it."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(xla, "PART_BYTES", 2 * D * jnp.dtype(dtype).itemsize * 64)
    x, wide = jnp.asarray(rng.normal(size=(33, D)), dtype), jnp.asarray(rng.normal(size=(S, 3, 96, D)) * 0.2)
    pool = lossy_quantize(wide, format)
    biases = ExpertBiases(*(jnp.asarray(rng.normal(size=(S, size)), dtype) for size in (96, 96, D)))
    compute = run()
    y = compute(x, pool, SLOTS, SIZES, biases=biases)
    exact = grouped_ffn(
        x.astype(jnp.float32), dequantize(pool), SLOTS, SIZES, biases=biases, implementation="reference"
    )
    assert_close(y[7:27], in_f64(exact)[7:27], {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype])
    text = compute.lower(x, pool, SLOTS, SIZES, biases=biases).compile().as_text()
    assert ("s8[1,3,32,64]" if format == "int8" else "u8[1,3,32,32]") in text


def test_a_width_without_divisors_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "PART_BYTES", 1000)
    pool = jnp.ones((2, 3, 47, 16))
    y = run()(jnp.ones((3, 16)), pool, np.int32([1]), np.int32([3]))
    assert_close(y, ffn_f64(np.ones((3, 16)), in_f64(pool), [1], [3]), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_off_the_cpu_no_loop_has_a_computed_end(dtype: str) -> None:
    x, pool = rows_and_pool(dtype)
    compute = run(GPU)
    y = compute(x, to_storage(pool), SLOTS, SIZES, out=jnp.full_like(x, 9))
    expected = ffn_f64(in_f64(x), in_f64(pool), SLOTS, SIZES)
    expected[4:7], expected[28:] = 9, 9
    assert_close(y, expected, 1e-2 if dtype == "bfloat16" else 1e-5)
    for sizes in (SIZES, None):
        slots = SLOTS if sizes is not None else np.zeros(33, np.int32)
        assert "while[" not in str(compute.trace(x, to_storage(pool), slots, sizes).jaxpr)
        assert "while[" in str(run().trace(x, to_storage(pool), slots, sizes).jaxpr)


@pytest.mark.parametrize("stored", [True, False])
def test_16_bit_buffers_are_converted_nowhere_as_a_whole(stored: bool) -> None:
    x, pool = rows_and_pool("bfloat16")
    large = jnp.tile(x, (16, 1))
    held = to_storage(pool) if stored else pool
    compiled = run().lower(large, held, SLOTS, SIZES).compile()
    assert not re.search(rf"f32\[{S},3,", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes + 4 * (large.size + 8 * D) * 4


def test_other_operations_off_the_cpu() -> None:
    x, pool = rows_and_pool("float32")
    quantized = lossy_quantize(pool, "int8")
    assert_close(run(GPU)(x, quantized, SLOTS, SIZES), in_f64(run()(x, quantized, SLOTS, SIZES)), 1e-6)

    def loss(target: Target | None, x: jax.Array, matrices: jax.Array) -> jax.Array:
        y = slot_grouped_matmul(x, matrices, SLOTS, SIZES, transposed=True, implementation="xla", target=target)
        return jnp.sum(y * y)

    on_gpu, on_cpu = (jax.jit(jax.grad(functools.partial(loss, of), argnums=(0, 1))) for of in (GPU, None))
    for ours, theirs in zip(on_gpu(x, pool[:, 0]), on_cpu(x, pool[:, 0]), strict=True):
        assert_close(ours, in_f64(theirs), 1e-5)
