"""The README's table of families says what was measured, of every family."""

from ef_jax import families
from tests.parity import grades
from tests.parity.families import FAMILIES


def test_readme_and_file_agree() -> None:
    assert grades.README.read_text(encoding="utf-8") == grades.readme_with(grades.read()), (
        "run python -m tests.parity.grades"
    )


def test_every_family_is_exact() -> None:
    measured = grades.read()
    graded = {grades.TEXT_OF.get(family, family) for family in families.FAMILIES}
    assert graded == measured.keys()
    assert FAMILIES.keys() <= graded
    assert {family: grades.grade_of(family, measured[family]) for family in graded} == dict.fromkeys(graded, "exact")


def test_what_is_unsupported_is_refused() -> None:
    assert not families.FAMILIES.keys() & set(grades.UNSUPPORTED)
