"""Choosing a backend, and arguments that cannot be."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import (
    BACKENDS,
    ExpertBiases,
    Problem,
    Target,
    choose_backend,
    default_target,
    grouped_ffn,
    lossy_quantize,
    slot_grouped_matmul,
)
from pallas_kernels.grouped_ffn import backends
from pallas_kernels.grouped_ffn.backend import Backend
from pallas_kernels.grouped_ffn.problem import fitting_tile_rows

D, F, S = 32, 16, 12
ARGUMENTS = {
    "x_sorted": np.zeros((4, D), np.float32),
    "pool": np.zeros((S, 3, F, D), np.float32),
    "slot_of_group": np.int32([0, 1]),
    "group_sizes": np.int32([2, 2]),
}


def problem(target: Target) -> Problem:
    return Problem(
        rows=4, groups=2, slots=S, contract=D, width=F, dtype=np.dtype("float32"), activation="silu", target=target
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": np.zeros((S, 4, F, D), np.float32)}, r"pool must be \[S, 3, F, 32\]"),
        (
            {"pool": np.zeros((S, 2, F, D), np.float32), "activation": "clamped_swiglu"},
            "activation 'clamped_swiglu' is not one of silu, gelu, gelu_tanh, relu, relu2$",
        ),
        (
            {"pool": np.zeros((S, 2, F, D), np.float32), "biases": ExpertBiases(*[np.zeros((S, F), np.float32)] * 3)},
            r"blocks without a gate take no biases, the pool is \(12, 2, 16, 32\)",
        ),
        ({"pool": np.zeros((S, 3, F, 8), np.float32)}, r"pool must be \[S, 3, F, 32\], .* got \(12, 3, 16, 8\)"),
        ({"pool": np.zeros((S, 3, F, D), np.uint16)}, "does not hold weights for rows of float32"),
        ({"slot_of_group": np.int32([1])}, "must be equal"),
        ({"slot_of_group": np.int32([0, 12])}, "slot_of_group has 12, the pool has slots 0 to 11"),
        ({"slot_of_group": np.int32([-2, 1])}, "slot_of_group has -2"),
        ({"group_sizes": np.int32([2, 3])}, r"sum to at most 4, got \[2, 3\]"),
        ({"group_sizes": np.int32([-1, 3])}, r"at least 0 and sum to at most 4, got \[-1, 3\]"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of"),
        ({"implementation": "cublas"}, "implementation 'cublas' is not one of"),
        ({"tile_rows": 0}, "tile_rows must be positive, got 0"),
        (
            {"biases": ExpertBiases(*(np.zeros((S, F), np.float32) for _ in range(3)))},
            r"down biases must be \(12, 32\), got \(12, 16\)",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**(ARGUMENTS | change))


def test_a_matrix_that_does_not_fit_is_named() -> None:
    arguments = (np.zeros((4, D), np.float32), np.zeros((S, F, D), np.float32), np.int32([0, 1]), np.int32([2, 2]))
    with pytest.raises(ValueError, match=r"pool must be \[S, 32, N\], got \(12, 16, 32\)"):
        slot_grouped_matmul(*arguments)
    assert slot_grouped_matmul(*arguments, transposed=True).shape == (4, F)


@pytest.mark.parametrize(("rows", "groups"), [(0, 2), (4, 0), (0, 0)])
def test_no_rows_or_no_groups_leave_what_out_holds(rows: int, groups: int) -> None:
    x, pool, out = np.zeros((rows, D), np.float32), ARGUMENTS["pool"], np.full((rows, D), 7, np.float32)
    none = np.zeros(groups, np.int32)
    assert np.array_equal(grouped_ffn(x, pool, none, none, out=out), out)
    assert slot_grouped_matmul(x, pool[:, 0], none, none, transposed=True).shape == (rows, F)


def test_checked_mode_looks_at_arrays_on_the_device() -> None:
    on_device = ARGUMENTS | {"slot_of_group": jnp.int32([0, 99])}
    with pytest.raises(ValueError, match="slot_of_group has 99"):
        grouped_ffn(**on_device, checked=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_of_group": [0, 99]}, "slot_of_group must be from -1 to 11"),
        ({"group_sizes": [4, 4]}, "group_sizes must be at least 0 and sum to at most 4"),
    ],
)
def test_checked_mode_under_jit_goes_through_checkify(change: dict, message: str) -> None:
    def run(slots: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_ffn(ARGUMENTS["x_sorted"], ARGUMENTS["pool"], slots, sizes, checked=True)

    values = {"slot_of_group": [0, 1], "group_sizes": [2, 2]} | change
    checked = jax.jit(checkify.checkify(run))
    error, _ = checked(*(jnp.int32(value) for value in values.values()))
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        error.throw()
    checked(jnp.int32([0, 1]), jnp.int32([2, 2]))[0].throw()


def test_quantized_arrays_that_do_not_fit_are_named() -> None:
    pool = lossy_quantize(jnp.zeros((S, 3, 32, 64)), "int4")
    narrow = jax.tree.map(lambda array: array[..., :1], pool)
    with pytest.raises(ValueError, match=r"down_scales \(12, 1, 1\) do not fit int4 blocks of \[3, 32, 2\]"):
        grouped_ffn(**(ARGUMENTS | {"pool": narrow}))


def test_the_default_backend_of_a_cpu_is_xla() -> None:
    assert choose_backend(problem(default_target())).name == "xla"


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Backend(name="picky", refuses=lambda _: "no such unit", ffn=len, matmul=len, outer=len)
    monkeypatch.setitem(backends.BACKENDS, "picky", picky)
    with pytest.raises(NotImplementedError, match=r"the picky backend cannot run 4 rows, .* on .*: no such unit"):
        grouped_ffn(**ARGUMENTS, implementation="picky")


def test_a_gpu_that_falls_back_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picky = Backend(name="picky", refuses=lambda _: "no such unit", ffn=len, matmul=len, outer=len)
    monkeypatch.setattr(backends, "BACKENDS", {"picky": picky, "xla": BACKENDS["xla"]})
    gpu = Target(platform="cuda", device_kind="an old card", capability=(7, 0), cores=80)
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        for _ in range(2):
            assert choose_backend(problem(gpu)).name == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_ffn runs on the xla backend on an old card: picky: no such unit"
    ]


def test_a_cuda_target_needs_a_capability() -> None:
    with pytest.raises(ValueError, match="needs its compute capability"):
        Target(platform="cuda", device_kind="H100")


@pytest.mark.parametrize(
    ("rows", "groups", "height"), [(1, 1, 8), (64, 8, 8), (65, 8, 16), (1024, 64, 16), (8192, 8, 128), (5, 0, 8)]
)
def test_tiles_fit_the_rows_of_a_group(rows: int, groups: int, height: int) -> None:
    assert fitting_tile_rows(rows, groups) == height
