"""The README's table of families: `python -m tests.parity.grades` measures again and rewrites it.

It runs the parity tests, gathers what those that pass have noted (the fixture `grade`), and writes grades.json and,
from it, the table. The tests fail where they measure worse than grades.json says, and where it and the README differ.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import pytest

from ef_jax import families
from tests.parity.families import FAMILIES
from tests.released import RELEASED, read_config

FILE = Path(__file__).parent / "grades.json"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- grades: written by python -m tests.parity.grades -->", "<!-- end of grades -->"
PROPERTY = "grade"

TEXT_OF = {"llama4": "llama4_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Families whose config.json holds a language model's own: they are graded together with it."""

UNSUPPORTED = ("deepseek_v32", "deepseek_v4", "gemma4", "glm4_moe_lite", "granitemoehybrid", "jamba", "nemotron_h")
"""Some that people run and that are refused by name."""

_TESTS = (
    "test_live.py",
    "test_alike.py",
    "test_recorded.py",
    "test_switch_transformers.py",
    "test_recorded_seq2seq.py",
)


class Grade(Protocol):
    """Notes what was measured of a family: `what` is a column's name."""

    def __call__(self, family: str, what: str, value: float | bool | str) -> None: ...


def read() -> dict[str, dict[str, Any]]:
    """What was measured of each family when the file was written; empty while it is measured again."""
    grades: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return grades


def bound(family: str) -> float:
    """The most that logits may differ, by what was measured; infinite where nothing was."""
    within: float = read().get(family, {}).get("within", math.inf)
    return within


def grade_of(family: str, measured: dict[str, Any]) -> str:
    """ "exact": all that can be compared was, and agreed; "runs": not all."""
    passed = all(measured.get(what) for what in ("greedy", "bits", "pregate", "round_trip", "cases"))
    if family in FAMILIES:
        passed = passed and measured["cases"] == len(FAMILIES[family].live)
        passed = passed and sorted(measured.get("recorded", ())) == sorted(FAMILIES[family].recorded)
    return "exact" if passed else "runs"


def table(grades: dict[str, dict[str, Any]]) -> str:
    """The rows of all families that `ef_jax.families` has, and those that it refuses."""
    lines = [
        "| family | released models, read and planned | grade | logits, largest difference | greedy tokens"
        " | bits of the all-resident run | conversion and back |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in families.FAMILIES:
        if family in TEXT_OF.values():
            continue
        measured = grades.get(TEXT_OF.get(family, family), {})
        names = [name for name in RELEASED if read_config(name)["model_type"] == family]
        cells = [
            f"`{family}`",
            ", ".join(names),
            grade_of(TEXT_OF.get(family, family), measured),
            _difference(measured),
            f"{measured['greedy']} the same" if measured.get("greedy") else "not compared",
            "the same" if measured.get("bits") else "not compared",
            "the same bytes" if measured.get("round_trip") else "not compared",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| {', '.join(f'`{name}`' for name in UNSUPPORTED)} | | unsupported | | | | |")
    return "\n".join(lines)


def _difference(measured: dict[str, Any]) -> str:
    if not measured.get("cases"):
        return "not compared"
    recorded = f" and {len(measured['recorded'])} recorded" if measured.get("recorded") else ""
    return f"{measured['within']:.0e} in {measured['cases']} cases{recorded}".replace("e-0", "e-")


def readme_with(grades: dict[str, dict[str, Any]]) -> str:
    """The README with their table between its two markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(grades)}\n{END}{rest.split(END)[1]}"


class _Notes:
    """A plugin of pytest that keeps what passing tests have noted."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, (family, what, value) in report.user_properties:
                assert name == PROPERTY
                self.values[family][what].append(value)

    def grades(self) -> dict[str, dict[str, Any]]:
        """What is written: of logits how many cases, and a bound twice what was measured, for other machines."""
        grades: dict[str, dict[str, Any]] = {}
        for family, noted in self.values.items():
            measured = {what: values[0] for what, values in noted.items() if what not in ("logits", "recorded")}
            if errors := noted.get("logits"):
                measured |= {"cases": len(errors), "within": _rounded_up(2 * max(errors))}
            if recorded := noted.get("recorded"):
                measured["recorded"] = sorted(recorded)
            grades[family] = measured
        return grades


def _rounded_up(value: float) -> float:
    """To the next of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(value))
    digit = next(digit for digit in (1, 2, 5, 10) if digit * 10.0**power >= value)
    return float(f"{digit * 10.0**power:.0e}")


def main() -> int:
    """Measure what the tests note, all or those that pytest's options in `sys.argv` select, and rewrite both files."""
    before, notes = read(), _Notes()
    FILE.unlink(missing_ok=True)  # so that nothing is held against what it says
    try:
        tests = [str(Path(__file__).parent / name) for name in _TESTS]
        status = pytest.main([*tests, "-n", "0", "-q", *(sys.argv[1:] or ["-k", "not bundled"])], plugins=[notes])
    finally:
        measured = notes.grades()
        merged = {family: before.get(family, {}) | measured.get(family, {}) for family in sorted(before | measured)}
        FILE.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    README.write_text(readme_with(merged), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
