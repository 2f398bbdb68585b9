"""What the tests say for the table of grades."""

import pytest

from tests.parity import grades


@pytest.fixture
def grade(request: pytest.FixtureRequest) -> grades.Grade:
    """Notes what was measured of a family, for `python -m tests.parity.grades`; of tests that pass only."""

    def note(family: str, what: str, value: float | bool | str) -> None:
        request.node.user_properties.append((grades.PROPERTY, (family, what, value)))

    return note
