"""The backends that run on any platform, by the tests that all share."""

from tests.pallas_kernels.base import BackendTests


class TestXla(BackendTests):
    implementation = "xla"


class TestReference(BackendTests):
    implementation = "reference"
