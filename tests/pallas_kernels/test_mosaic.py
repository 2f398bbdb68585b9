"""The Mosaic backend in its interpreter, as if on an H100, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BACKENDS, Problem, Target
from pallas_kernels.grouped_ffn.mosaic_items import aligned_items
from tests.pallas_kernels.base import BackendTests, assert_close, in_f64, spans

H100 = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=2, interpret=True)


PROBLEM = Problem(
    rows=8,
    groups=2,
    slots=4,
    contract=128,
    width=64,
    dtype=np.dtype("float16"),
    activation="silu",
    target=dataclasses.replace(H100, interpret=False),
)
AMPERE = Target(platform="cuda", device_kind="NVIDIA A100", capability=(8, 0), cores=108)


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the interpreter has no transposed tiles before 0.11.2")
class TestMosaic(BackendTests):
    implementation = "mosaic"
    target = H100
    hidden = 192  # no multiple of a block's columns
    width = 64
    dtypes = ("bfloat16",)
    activations = ("silu",)
    formats = ("int8",)
    tile_heights = (8, 128)
    pattern_step = 85

    def run(self, x: jax.Array, pool: Any, slots: Any, sizes: Any, **options: Any) -> jax.Array:
        """In few shapes, as every program takes the interpreter seconds: more rows, and groups that have none."""
        if sizes is None:
            return super().run(x, pool, slots, sizes, **options)
        more = (48 if x.shape[0] <= 48 else 150) - x.shape[0]
        rows, groups = ((0, more), (0, 0)), (0, 8 - slots.shape[0])
        options["out"] = jnp.pad(options.get("out", jnp.zeros_like(x)), rows)
        slots, sizes = np.pad(slots, groups, constant_values=-1), np.pad(sizes, groups)
        return super().run(jnp.pad(x, rows), pool, slots, sizes, **options)[: x.shape[0]]

    def test_outer_reads_no_other_rows(self) -> None:
        a, b = self.random((40, self.width), "bfloat16", 15), self.random((40, self.hidden), "bfloat16", 16)
        slots, sizes = jnp.int32([1, -1, 0]), jnp.int32([9, 4, 20])
        problem = dataclasses.replace(PROBLEM, rows=40, contract=self.hidden, dtype=np.dtype(a.dtype), target=H100)
        stray = jnp.array([0] * 9 + [1] * 4 + [0] * 20 + [1] * 7, bool)[:, None]
        poisoned = (jnp.where(stray, jnp.nan, a), jnp.where(stray, jnp.inf, b))
        sums = BACKENDS["mosaic"].outer(*poisoned, slots, sizes, problem)
        expected = np.zeros((problem.slots, self.width, self.hidden))
        for slot, rows in spans(slots.tolist(), sizes.tolist()):
            expected[slot] = in_f64(a)[rows].T @ in_f64(b)[rows]
        assert_close(sums, expected, 1e-5)


@pytest.mark.parametrize("height", [16, 64])
def test_tiles_hold_every_row_of_every_group_once(height: int) -> None:
    rng = np.random.default_rng(height)
    for rows in (1, 7, 90, 400):
        groups = int(rng.integers(1, 9))
        cuts = np.sort(rng.integers(0, rows + 1, groups))
        sizes = np.diff(cuts, prepend=0).astype(np.int32)
        slots = rng.integers(-1, 5, groups).astype(np.int32)
        items = aligned_items(jnp.asarray(slots), jnp.asarray(sizes), total_rows=rows, height=height)
        slot_of_row = np.full(rows, -1)
        for item in range(int(items.total[0])):
            begin, end = int(items.begin[item]), int(items.end[item])
            assert 0 <= begin < end <= height
            held = slice(int(items.box[item]) * 8 + begin, int(items.box[item]) * 8 + end)
            assert (slot_of_row[held] == -1).all()
            slot_of_row[held] = items.slot[item]
        inside = np.repeat(slots, sizes)
        assert slot_of_row.tolist() == [*inside, *[-1] * (rows - len(inside))]


def test_refuses_what_it_cannot_run() -> None:
    refuses = BACKENDS["mosaic"].refuses
    assert refuses(PROBLEM) is None
    for change, reason in (
        ({"target": AMPERE}, r"compute capability 9.0, NVIDIA A100 has (8, 0)"),
        ({"target": Target(platform="cpu", device_kind="cpu")}, "the target is cpu"),
        ({"target": dataclasses.replace(PROBLEM.target, cores=0)}, "multiprocessors"),
        ({"dtype": np.dtype("float32")}, "rows of float32"),
        ({"storage": "int4"}, "int4 weights"),
        ({"width": 72}, "128 x 72"),
        ({"tile_rows": 256}, "tile_rows is 256"),
    ):
        assert reason in (refuses(dataclasses.replace(PROBLEM, **change)) or "")
