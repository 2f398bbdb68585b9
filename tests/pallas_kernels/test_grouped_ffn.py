"""One test base for every backend of `grouped_ffn`: right, batch-invariant, and every row written or left alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BACKENDS, choose_backend, grouped_ffn, storage_dtype
from pallas_kernels.grouped_ffn.work_items import work_items

D, F, S = 32, 16, 12
ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


def make_pool(dtype: str, seed: int = 0) -> tuple[np.ndarray, jax.Array]:
    """Weights in f64, and the same as a stored pool."""
    weights = np.random.default_rng(seed).normal(size=(S, 3, F, D)) * 0.2
    pool = jnp.asarray(weights, dtype)
    exact = np.asarray(pool.astype(jnp.float32), np.float64)
    stored = storage_dtype(dtype)
    return exact, pool if pool.dtype == stored else jax.lax.bitcast_convert_type(pool, stored)


def in_f64(x: np.ndarray, pool: np.ndarray, slots: list[int], sizes: list[int], activation: str) -> np.ndarray:
    def gelu(v):
        return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))

    act = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "gelu_tanh": gelu,
        "relu": lambda v: np.maximum(v, 0),
        "relu2": lambda v: np.maximum(v, 0) ** 2,
    }[activation]
    y = np.zeros_like(x)
    row = 0
    for slot, size in zip(slots, sizes, strict=True):
        part = x[row : row + size]
        if slot >= 0:
            y[row : row + size] = (act(part @ pool[slot, 0].T) * (part @ pool[slot, 1].T)) @ pool[slot, 2]
        row += size
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu2"])
def test_equals_float64(backend, dtype, activation):
    rng = np.random.default_rng(1)
    exact, pool = make_pool(dtype)
    slots, sizes = [3, -1, 0, 11, 5], [4, 3, 0, 20, 1]
    x = jnp.asarray(rng.normal(size=(30, D)), dtype)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    y = grouped_ffn(x, pool, np.int32(slots), np.int32(sizes), activation=activation, implementation=backend)
    expected = in_f64(wide, exact, slots, sizes, activation)
    got = np.asarray(y.astype(jnp.float32), np.float64)
    assert y.dtype == x.dtype
    assert np.abs(got - expected).max() <= ERROR[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pattern_of_empty_groups(backend):
    exact, pool = make_pool("float32")
    x = np.random.default_rng(2).normal(size=(27, D)).astype(np.float32)
    slots = np.array([7, 0, 3, 1, 9, 2, 11, 4], np.int32)
    run = jax.jit(lambda x, pool, sizes: grouped_ffn(x, pool, slots, sizes, implementation=backend))
    for pattern in itertools.product((0, 1), repeat=8):
        sizes = np.array([3, 1, 9, 2, 4, 1, 5, 2], np.int32) * np.array(pattern, np.int32)
        expected = in_f64(x.astype(np.float64), exact, slots.tolist(), sizes.tolist(), "silu")
        np.testing.assert_allclose(run(x, pool, sizes), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_skipped_groups_and_past_the_last_group_keep_what_out_holds(backend):
    _, pool = make_pool("float32")
    x = np.random.default_rng(3).normal(size=(20, D)).astype(np.float32)
    poison = np.full_like(x, 777.0)
    y = np.asarray(grouped_ffn(x, pool, np.int32([2, -1, 5]), np.int32([6, 4, 3]), out=poison, implementation=backend))
    kept = np.all(y == 777.0, axis=1)
    assert kept.tolist() == [False] * 6 + [True] * 4 + [False] * 3 + [True] * 7
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@given(data=st.data())
@settings(max_examples=20)
def test_a_row_does_not_depend_on_its_company(dtype, data):
    """The same group alone, with others, in another slot, in a larger pool: the same bits."""
    _, pool = make_pool(dtype)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    size = data.draw(st.integers(1, 20))
    x = jnp.asarray(rng.normal(size=(40, D)), dtype)
    group = x[:size]
    alone = grouped_ffn(jnp.pad(group, ((0, 40 - size), (0, 0))), pool, np.int32([4]), np.int32([size]))[:size]
    before = data.draw(st.integers(0, 40 - size))
    mixed = jnp.concatenate([x[:before], group, x[before : 40 - size]])
    larger = jnp.concatenate([pool, pool])
    company = grouped_ffn(mixed, larger, np.int32([1, 4 + S, 6]), np.int32([before, size, 40 - size - before]))[
        before : before + size
    ]
    assert np.array_equal(np.asarray(alone).view(np.uint8), np.asarray(company).view(np.uint8))


@pytest.mark.parametrize("tile_rows", [8, 32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_does_not_depend_on_its_place_in_a_tile(dtype, tile_rows):
    _, pool = make_pool(dtype)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(tile_rows, D)), dtype)
    run = jax.jit(lambda x: grouped_ffn(x, pool, np.int32([3]), np.int32([tile_rows]), tile_rows=tile_rows))
    rows = [np.asarray(run(jnp.roll(x, place, 0))[place]).view(np.uint8) for place in range(tile_rows)]
    assert all(np.array_equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_of_one_row_need_no_sizes(backend, dtype):
    _, pool = make_pool(dtype)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(6, D)), dtype)
    slots = np.int32([3, 0, -1, 7, 11, 3])
    short = grouped_ffn(x, pool, slots, None, out=jnp.full_like(x, 9), implementation=backend)
    long = grouped_ffn(x, pool, slots, np.ones(6, np.int32), out=jnp.full_like(x, 9), implementation=backend)
    assert np.array_equal(np.asarray(short).view(np.uint8), np.asarray(long).view(np.uint8))
    assert (np.asarray(short[2].astype(jnp.float32)) == 9).all()


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9), tile=st.sampled_from([1, 4, 8]), data=st.data())
def test_work_items_cover_every_row_once(sizes, tile, data):
    slots = data.draw(st.lists(st.integers(-1, 3), min_size=len(sizes), max_size=len(sizes)))
    total = sum(sizes) + data.draw(st.integers(0, 5))
    items = work_items(jnp.int32(sizes), jnp.int32(slots), total_rows=max(total, 1), tile_rows=tile)
    covered = []
    for i in range(int(items.total)):
        group, row, rows = int(items.group[i]), int(items.row[i]), int(items.rows[i])
        start = sum(sizes[:group])
        assert (row - start) % tile == 0
        assert 0 < rows <= tile
        assert slots[group] >= 0
        covered += [(group, r) for r in range(row, row + rows)]
    ends = np.cumsum(sizes)
    wanted = [(g, r) for g in range(len(sizes)) if slots[g] >= 0 for r in range(ends[g] - sizes[g], ends[g])]
    assert covered == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": np.zeros((S, 2, F, D), np.float32)}, r"pool must be \[S, 3, F, 32\]"),
        ({"pool": np.zeros((S, 3, F, D), np.uint16)}, "does not hold weights for rows of float32"),
        ({"slot_of_group": np.int32([1])}, "must be equal"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of"),
        ({"implementation": "cublas"}, "implementation 'cublas' is not one of"),
        ({"tile_rows": 0}, "tile_rows must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "x_sorted": np.zeros((4, D), np.float32),
        "pool": np.zeros((S, 3, F, D), np.float32),
        "slot_of_group": np.int32([0, 1]),
        "group_sizes": np.int32([2, 2]),
    }
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**(arguments | change))


def test_the_default_backend_is_reported():
    assert choose_backend(None) == "xla"
