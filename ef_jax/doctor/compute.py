"""What device and host read and multiply."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ef_jax.doctor.timing import least_seconds
from pallas_kernels import grouped_ffn, storage_dtype

_HIDDEN, _WIDTH = 1024, 512
_BLOCK_BYTES = 3 * _WIDTH * _HIDDEN * 2
_GROUPS = 8
_ROWS = {"cpu": 64}  # a group, of many: enough that products take longer than reading
_MANY_ROWS = 4096
_CALLS = {"cpu": 1}  # in a row, so that on an accelerator dispatch is not what is measured
_MANY_CALLS = 20
_COPY_BYTES = 64 << 20
_MATRIX = 1024


def measure_device(device: jax.Device, blocks: int = 64) -> dict[str, Any]:
    """Bytes a second at which decoding reads weights, operations a second of prompts' products, seconds of a dispatch.

    Both rates are of the kernel that computes experts: one row for each of eight experts of 3 MB, and many rows.
    """
    calls = _CALLS.get(device.platform, _MANY_CALLS)
    dtype = jnp.dtype(jnp.bfloat16)
    with jax.default_device(device):
        pool = jnp.zeros((blocks, 3, _WIDTH, _HIDDEN), storage_dtype(dtype))
        decode = _kernel_seconds(pool, 1, calls)
        rows = _ROWS.get(device.platform, _MANY_ROWS)
        prompt = _kernel_seconds(pool, rows, calls)
        number = jnp.zeros((), jnp.float32)
        program = jax.jit(lambda x: x + 1).lower(number).compile()
        dispatch = least_seconds(lambda: [program(number) for _ in range(100)], seconds=0.05) / 100
    return {
        "bandwidth": _GROUPS * _BLOCK_BYTES / decode,
        "flops": _GROUPS * rows * 2 * 3 * _WIDTH * _HIDDEN / prompt,
        "dispatch": dispatch,
    }


def measure_host() -> dict[str, Any]:
    """Bytes a second that the CPU copies, and operations a second of its float32 products, by numpy."""
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    result = np.empty_like(matrix)
    copy = least_seconds(lambda: np.copyto(target, source))
    multiply = least_seconds(lambda: np.matmul(matrix, matrix, out=result))
    return {"bandwidth": _COPY_BYTES / copy, "flops": 2 * _MATRIX**3 / multiply}


def _kernel_seconds(pool: jax.Array, rows: int, calls: int) -> float:
    """Of one call with `rows` rows for each of `_GROUPS` experts, other experts each time."""
    x = jnp.ones((_GROUPS * rows, _HIDDEN), jnp.bfloat16)
    sizes = None if rows == 1 else jnp.full((_GROUPS,), rows, jnp.int32)
    slots = [jnp.arange(first, first + _GROUPS, dtype=jnp.int32) for first in range(0, len(pool), _GROUPS)]
    program: Callable[..., jax.Array] = jax.jit(lambda x, pool, slots, sizes: grouped_ffn(x, pool, slots, sizes))
    turn = 0

    def run() -> None:
        nonlocal turn
        for _ in range(calls):
            result = program(x, pool, slots[turn % len(slots)], sizes)
            turn += 1
        result.block_until_ready()

    return least_seconds(run) / calls
