"""Every backend on the GPU at hand, by the tests that all share."""

import jax
import pytest

from tests.pallas_kernels.base import BackendTests

pytestmark = pytest.mark.gpu


class OnGpu(BackendTests):
    hidden, width = 512, 256
    tile_heights = (8, 16, 32, 64, 128)


class TestTriton(OnGpu):
    implementation = "triton"


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or str(getattr(jax.devices()[0], "compute_capability", "")) != "9.0",
    reason="needs compute capability 9.0",
)
class TestMosaic(OnGpu):
    implementation = "mosaic"
    dtypes = ("bfloat16", "float16")
    formats = ("int8",)


class TestXla(OnGpu):
    implementation = "xla"
