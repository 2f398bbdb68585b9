import pytest

from tests.cuda import aot


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = aot.missing()
    for item in items:
        if reason and item.get_closest_marker("cuda_compile"):
            item.add_marker(pytest.mark.skip(reason=reason))
