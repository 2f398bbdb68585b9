"""The families as the parity tests know them: one module of constants each, named as its `model_type`.

A module holds
  SIZES: a tiny configuration, given to transformers' config class.
  LIVE: (seed, what differs from SIZES) of the cases that are compared with transformers on the spot. Together they
    switch every optional feature of the family on and off.
  RECORDED: folder below tests/fixtures/parity -> (seed, what differs), of the cases that are compared with files.
  TOLERANCE: most that a logit of order 1 may differ, where that is not `FamilyCases.tolerance`.
  CONFIG_TYPE: transformers' name of the config class, where that is not the model_type.
  REFUSED: (what differs, the field that the refusal names), of configurations that ask for what is not implemented.
and every one of them is tested in every way that the tests of this folder know.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilyCases:
    """What is compared of one family (see the module's docstring)."""

    model_type: str
    sizes: Changes
    live: tuple[tuple[int, Changes], ...]
    recorded: Mapping[str, tuple[int, Changes]]
    tolerance: float = 2e-4
    config_type: str = ""
    refused: tuple[tuple[Changes, str], ...] = (({"hidden_act": "tanh"}, "hidden_act"),)

    def __post_init__(self) -> None:
        for name, case in {**dict(enumerate(self.live)), **self.recorded}.items():
            if not (isinstance(case, tuple) and len(case) == 2 and isinstance(case[0], int)):
                raise TypeError(f"{self.model_type}: case {name} must be (seed, changes), got {case!r:.80}")
        if len({seed for seed, _ in self.live}) < 2:
            raise ValueError(f"{self.model_type}: LIVE needs cases of several seeds")
        if not self.recorded:
            raise ValueError(f"{self.model_type}: RECORDED needs a case")


def _cases(module: ModuleType) -> FamilyCases:
    """Raises where a constant is missing or is not what it should be; other names are the module's own."""
    constants = {name.lower(): value for name, value in vars(module).items() if name.isupper() and name in _CONSTANTS}
    return FamilyCases(model_type=module.__name__.rpartition(".")[2], **constants)


_CONSTANTS = {field.name.upper() for field in dataclasses.fields(FamilyCases)} - {"MODEL_TYPE"}

FAMILIES: dict[str, FamilyCases] = {
    info.name: _cases(importlib.import_module(f"{__name__}.{info.name}"))
    for info in pkgutil.iter_modules(__path__)
    if not info.name.startswith("_")
}
"""model_type -> its cases. A module with an error fails the import, and so every test of this folder."""

LIVE: tuple[tuple[str, int, Changes], ...] = tuple(
    (name, *case) for name, family in FAMILIES.items() for case in family.live
)

RECORDED: dict[str, tuple[str, int, Changes]] = {
    folder: (name, *case) for name, family in FAMILIES.items() for folder, case in family.recorded.items()
}


def case_ids(cases: tuple[tuple[str, int, Changes], ...]) -> list[str]:
    """Names of cases for pytest: family, seed, changed fields."""
    return ["-".join([name, str(seed), *changes]) for name, seed, changes in cases]
