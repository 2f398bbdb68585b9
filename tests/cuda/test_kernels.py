"""The kernels compile for an H100: nothing spilled, no copy of the pool, few temporaries, `out` updated in place."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BACKENDS,
    ExpertBiases,
    Problem,
    grouped_ffn,
    lossy_quantize,
    slot_grouped_matmul,
    storage_dtype,
    target_of,
)
from tests.cuda import aot, resources

pytestmark = [
    pytest.mark.cuda_compile,
    # jax 0.12 says so whenever it lowers a Triton kernel; the backend is for as long as it does.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

OURS = ("mosaic", "triton")


class Regime(NamedTuple):
    """Of an OLMoE layer: rows, D, F, E, and the height of a tile."""

    rows: int
    hidden: int
    width: int
    experts: int
    tile_rows: int


REGIMES = {"decode": Regime(64, 2048, 1024, 64, 8), "prompt": Regime(8192, 2048, 1024, 64, 128)}


def problem(regime: Regime, dtype: str, storage: Any = "dense", *, biased: bool = False, gated: bool = True) -> Problem:
    return Problem(
        rows=regime.rows,
        groups=regime.experts,
        slots=regime.experts,
        contract=regime.hidden,
        width=regime.width,
        dtype=np.dtype(jnp.dtype(dtype)),
        storage=storage,
        activation="clamped_swiglu" if biased else "silu",
        gated=gated,
        biased=biased,
        tile_rows=regime.tile_rows,
        target=target_of(aot.h100()),
    )


def arguments(regime: Regime, dtype: str, storage: Any = "dense", *, gated: bool = True) -> tuple[Any, ...]:
    """Rows, pool, slots, sizes and `out`."""
    shape = (regime.experts, 3 if gated else 2, regime.width, regime.hidden)
    if storage == "dense":
        pool = aot.abstract(shape, storage_dtype(dtype))
    else:
        blocks = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        parts = jax.eval_shape(functools.partial(lossy_quantize, format=storage), blocks)
        pool = jax.tree.map(lambda part: aot.abstract(part.shape, part.dtype), parts)
    rows, ids = aot.abstract((regime.rows, regime.hidden), dtype), aot.abstract((regime.experts,), jnp.int32)
    return rows, pool, ids, ids, rows


def check(
    name: str, regime: Regime, dtype: str, storage: Any = "dense", *, biased: bool = False, gated: bool = True
) -> None:
    if reason := BACKENDS[name].refuses(problem(regime, dtype, storage, biased=biased, gated=gated)):
        pytest.skip(f"{name}: {reason}")
    options = {"tile_rows": regime.tile_rows, "implementation": name, "target": target_of(aot.h100())}

    def run(x, pool, slots, sizes, out, biases):  # type: ignore[no-untyped-def]
        activation = "silu" if biases is None else "clamped_swiglu"
        return grouped_ffn(x, pool, slots, sizes, out=out, biases=biases, activation=activation, **options)

    biases = None
    if biased:
        each = (regime.width, regime.width, regime.hidden)
        biases = ExpertBiases(*(aot.abstract((regime.experts, size), dtype) for size in each))
    given = arguments(regime, dtype, storage, gated=gated)
    compiled, kernels = resources.compile_and_look(run, *given, biases, donate_argnums=4)
    for kernel in kernels:
        kernel.check()
    memory = compiled.memory_analysis()
    row_bytes = regime.rows * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == row_bytes * regime.hidden
    if name in OURS:
        # What the two matmuls give, the inner rows and the outputs, and the tables of work items.
        assert memory.temp_size_in_bytes <= 2 * row_bytes * (regime.width + regime.hidden) + 64 * 1024
    else:
        block = 3 * regime.width * regime.hidden * 4
        assert memory.temp_size_in_bytes <= 4 * block + 4 * row_bytes * (regime.width + regime.hidden)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_every_backend_compiles(name: str, dtype: str, regime: str) -> None:
    check(name, REGIMES[regime], dtype)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("storage", ["int8", "int4", "mxfp4", "fp8"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_quantized_blocks_compile(name: str, storage: str, regime: str) -> None:
    check(name, REGIMES[regime], "bfloat16", storage)


@pytest.mark.parametrize("name", [name for name in OURS if name in BACKENDS])
def test_an_uneven_shape_with_biases_compiles(name: str) -> None:
    """gpt-oss's 2,880 columns are no multiple of 128."""
    check(name, Regime(128, 2880, 2880, 32, 8), "bfloat16", biased=True)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", [name for name in OURS if name in BACKENDS])
def test_blocks_without_a_gate_compile(name: str, regime: str) -> None:
    check(name, REGIMES[regime], "bfloat16", gated=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in OURS if name in BACKENDS])
def test_the_plain_matmul_compiles(name: str, transposed: bool) -> None:
    regime = REGIMES["prompt"]
    x, _, ids, _, _ = arguments(regime, "bfloat16")
    shape = (regime.width, regime.hidden) if transposed else (regime.hidden, regime.width)
    pool = aot.abstract((regime.experts, *shape), jnp.uint16)
    run = functools.partial(
        slot_grouped_matmul, transposed=transposed, implementation=name, target=target_of(aot.h100())
    )
    compiled, kernels = resources.compile_and_look(run, x, pool, ids, ids)
    for kernel in kernels:
        kernel.check()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * regime.rows * regime.width * 2 + 64 * 1024


@pytest.mark.parametrize("name", [name for name in OURS if name in BACKENDS])
def test_the_gradient_of_weights_compiles(name: str) -> None:
    regime = REGIMES["prompt"]
    backend, described = BACKENDS[name], problem(regime, "bfloat16")
    x, _, ids, _, _ = arguments(regime, "bfloat16")
    inner = aot.abstract((regime.rows, regime.width), jnp.bfloat16)

    def run(a, b, slots, sizes):  # type: ignore[no-untyped-def]
        return backend.outer(a, b, slots, sizes, described)

    _, kernels = resources.compile_and_look(run, inner, x, ids, ids)
    for kernel in kernels:
        kernel.check()
