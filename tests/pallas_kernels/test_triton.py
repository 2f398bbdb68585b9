"""The Triton backend in Pallas's interpreter, as if on an H100, and what it refuses."""

from pallas_kernels import Target
from tests.pallas_kernels.base import BackendTests

H100 = Target(platform="cuda", device_kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=2, interpret=True)


class TestTriton(BackendTests):
    implementation = "triton"
    target = H100
    pattern_step = 37
