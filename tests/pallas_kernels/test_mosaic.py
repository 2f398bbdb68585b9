"""The Mosaic backend in its interpreter, as if on an H100, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import BACKENDS, Problem, Target
from tests.pallas_kernels.base import BackendTests

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
    hidden = 128
    width = 64
    slots = 12
    dtypes = ("bfloat16", "float16")
    activations = ("silu",)
    formats = ()
    tile_heights = (8, 128)
    pattern_step = 101


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
